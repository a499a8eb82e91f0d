"""The prompts of a video's parts: as clients read them, as its job keeps them, and a new one while it is made.

Which chunk is the first that a new prompt can still be for is the controller's to know.
"""

import json
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.files import atomic_write
from launch.plan import Plan
from launch.serve.store import Job, Store


class TooLate(Exception):  # noqa: N818 - reads as what it says
    """No chunk is left that a new prompt could be for; its text says why."""


def chunk_seconds(plan: Plan) -> float:
    """How long a chunk lasts."""
    return plan.model.config.figures.chunk_frames / plan.model.config.figures.fps


def prompts_of(plan: Plan) -> list[dict[str, Any]]:
    """All prompts, with the first chunk that is made of each and the second at which that begins."""
    each, request = chunk_seconds(plan), plan.request
    starts = ((0, request.prompt), *request.script)
    return [{"chunk": first, "seconds": round(first * each, 3), "prompt": prompt} for first, prompt in starts]


def write_prompts(prompts: Mapping[str, str], folder: Path) -> str:
    """Keep prompts of later parts, by their times, in a job's folder; returns the name of the file, a new one."""
    name = f"prompts-{secrets.token_hex(4)}.json"
    with atomic_write(folder / name) as file:
        file.write(json.dumps(dict(prompts)).encode())
    return name


def script_of(plan: Plan) -> dict[str, str]:
    """The prompts of later parts by their times, from which the same chunks follow again."""
    each = chunk_seconds(plan)
    return {f"{first * each:.6f}s": prompt for first, prompt in plan.request.script}


def change_job(store: Store, job: Job, plan: Plan, first: int, prompt: str) -> Plan:
    """Write down that a job's video is made of another prompt from a chunk on; returns its plan.

    The job is replaced as a whole. An InputError says that the disk does not take it; nothing has changed then.
    """
    plan = replace(plan, request=plan.request.with_prompt(first, prompt))
    line = {**job.line, "prompt": plan.request.prompt}
    if plan.request.script:
        line["script"] = write_prompts(script_of(plan), store.folder(job))
    before = job.line, job.prompts
    try:
        job.line, job.prompts = line, prompts_of(plan)
        store.save(job)
    except BaseException:
        job.line, job.prompts = before
        raise
    finally:
        for path in store.folder(job).glob("prompts-*.json"):
            if path.name != job.line.get("script"):
                with suppress(OSError):
                    path.unlink()
    return plan
