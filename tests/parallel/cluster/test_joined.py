"""Commands on a cluster that is there already: they join it, and leave it as it was."""

import json
import os
import sys
from pathlib import Path

import pytest

from models.pocket.words import VOCABULARY
from tests.launch.process import flowcache_process, overflowing_weights
from tests.launch.resume.going_on import OTHER, PROMPT, generate, killed_and_going_on
from tests.parallel.forked import interpreter, ray_workers

pytestmark = pytest.mark.slow
PROMPTS = [PROMPT, OTHER]
OPTIONS = ["--steps", "8", "--threads", "1"]


@pytest.fixture(autouse=True)
def joined(cluster, tmp_path, monkeypatch):
    for name, value in {"RAY_ADDRESS": cluster.address, **ray_workers()}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "executable", interpreter())  # of the commands
    monkeypatch.chdir(tmp_path)


def write(*lines):
    Path("prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_batch_joins_the_cluster_that_it_is_told_of(tmp_path):
    """With weights that one word of a prompt makes overflow: that video is reported, and the other one made."""
    word = VOCABULARY.index("blue")
    weights = overflowing_weights(tmp_path / "weights", "y_embedder.y_proj_xattn.0.weight", slice(word, word + 1))
    write(*({"prompt": prompt, "chunks": 1} for prompt in reversed(PROMPTS)))
    size = ["--steps", "8", "--height", "64", "--width", "64", "--weights", weights, "--pp", "2"]
    wide = flowcache_process(tmp_path, "batch", "prompts.jsonl", "--threads", "99", "--gangs", "4", *size)
    _, text = wide.communicate(timeout=60)
    assert "of --gangs 4 no more than 2 can have work" in text
    assert wide.returncode == 2 and "2 gangs of --pp 2 x --cp 1 need 396 CPUs; the cluster has" in text
    made = flowcache_process(tmp_path, "batch", "prompts.jsonl", *size)
    _, text = made.communicate(timeout=90)
    assert made.returncode == 1, text
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 1
    lines = (tmp_path / "videos" / "results.jsonl").read_text().splitlines()
    found = {one["prompt"]: one for one in map(json.loads, lines)}
    assert [found[prompt]["status"] for prompt in PROMPTS] == ["done", "failed"]
    assert "rank 0 has computed NaN or infinity at tick 0, chunk 0: " in found[PROMPTS[1]]["error"]
    assert "was lost" not in text


def test_a_video_that_was_killed_goes_on_and_ends_with_the_same_frames(tmp_path):
    killed_and_going_on(tmp_path, OPTIONS, ["--pp", "2", "--launcher", "ray"], 1)


def test_a_video_of_a_batch_is_made_longer(tmp_path):
    """On a cluster, as it was made."""
    write({"prompt": PROMPT, "chunks": 2, "seed": 4})
    process = flowcache_process(
        tmp_path, "batch", "prompts.jsonl", "--out", "made", *OPTIONS, "--pp", 2, "--keep-state"
    )
    assert process.communicate(timeout=150) and process.returncode == 0
    (video,) = Path("made").glob("*.mp4")
    process = flowcache_process(tmp_path, "continue", video, "--seconds", 1, "--out", "longer.mp4")
    _, said = process.communicate(timeout=150)
    assert process.returncode == 0, said
    generate(*OPTIONS, "--chunks", 3, "--seed", 4, "--out", "whole.mp4")
    assert Path("longer.mp4").read_bytes() == Path("whole.mp4").read_bytes()
    assert sorted(os.listdir()) == ["longer.mp4", "longer.state", "made", "prompts.jsonl", "whole.mp4"]
