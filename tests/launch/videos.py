"""Videos made within the test's own process."""

from __future__ import annotations

import time

import torch
from rich.console import Console

from launch.generate import make_with, this_process
from launch.options import Options
from launch.output.display import Display, Summary
from launch.plan import plan_videos


def generate_video(options: Options) -> Summary:
    """Make the one video of the options, into its file, without showing anything."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    plans, began = plan_videos(options), time.monotonic()
    with this_process(plans[0].model, 1) as backend:
        return make_with(backend, plans, Display(Console(quiet=True)), began).summaries[0]
