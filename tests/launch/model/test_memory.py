"""Memory that a video needs: worked out from its size and layout, and said with what is free and what would fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from engine.kv.layout import KVSettings
from engine.request import Request
from engine.reuse.policy import ReuseSettings
from launch.model import memory
from launch.model.memory import Job, free_bytes
from launch.options import Options
from launch.plan import job, plan_requests
from models.errors import InputError
from models.families import family_of
from models.magi.presets import find_preset
from parallel.mesh import Layout


def _job(weights: Path, **given: object) -> Job:
    options = Options(prompts=["a red circle moving right"], weights=weights, **{"chunks": 8, **given})  # type: ignore[arg-type]
    return job(plan_requests(options, [Path("x.mp4")])[0])


def _released(name: str, **given: object) -> Job:
    config = find_preset(name).config()
    run = config.runtime_config
    size = {"height": run.video_size_h, "width": run.video_size_w, "num_steps": run.num_steps}
    request = Request(prompt="-", chunks=20, seed=0, **size)
    values = {
        "reuse": ReuseSettings(),
        "kv": KVSettings(),
        "layout": Layout(),
        "vae_bytes": family_of(config).vae_bytes(config, None),
    } | given
    return Job(config=config, request=request, **values)  # type: ignore[arg-type]


def test_it_follows_the_size_of_the_video_and_its_layout(random_weights: Path) -> None:
    (small,) = _job(random_weights).stages()
    assert small.weights == 4 * (3_401_702 + 6_889_319)
    (large,) = _job(random_weights, height=128, width=128).stages()
    assert (large.weights, large.kv, large.work) == (small.weights, 4 * small.kv, 4 * small.work)
    first, second = _job(random_weights, pp=2).stages()
    assert first.weights > second.weights and first.kv == small.kv // 2
    assert _job(random_weights, cp=2).stages()[0].kv == small.kv // 2
    assert _job(random_weights, chunks=1_000_000).stages() == [small]  # what it holds does not grow with its length
    assert replace(_job(random_weights), videos=3).stages()[0].kv == 3 * small.kv


def test_weights_of_a_released_model_are_its_parameters() -> None:
    # 4,459,898,128 parameters: 8.96 GB with the embedders in fp32, and the norms that are promoted to it.
    vae = 2 * 613_755_239
    assert _released("magi-4.5b").stages()[0].weights - vae == pytest.approx(8_960_177_216, rel=1e-3)
    assert _released("magi-4.5b-distill-quant").stages()[0].weights - vae == pytest.approx(5.14e9, rel=1e-2)


def test_finished_chunks_on_the_host_are_counted_there(monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = 34 * 12_150 * 2 * 8 * 128 * 2  # keys and values of 8 heads of 128 in bf16, 34 layers
    model = _released("magi-4.5b")
    (plain,) = model.stages()
    offload = replace(model, kv=KVSettings(offload=True))
    (needs,) = offload.stages()
    assert (plain.kv, plain.host) == (2 * 5 * chunk, 0)
    assert (
        needs.kv == 2 * 4 * chunk + (1 + 5) * chunk // 34
    )  # the window; rows of a layer put together, and of the next
    assert needs.host == 2 * 34 * 64 * 2**20  # 49.8 MB for each layer and branch; pinned memory comes in powers of two
    assert plain.total - needs.total == plain.kv - needs.kv > 3e9
    assert offload.total(shared=True) == needs.total + needs.host
    monkeypatch.setattr(memory, "_free_gpu_bytes", lambda *, alone: 26 * 10**9)
    with pytest.raises(InputError, match=r"needs 28.4 GB, 26.0 GB are free: --kv-offload needs 25.3 GB, --pp 2 needs"):
        model.check("cuda")
    offload.check("cuda")
    monkeypatch.setattr(memory, "free_bytes", lambda: 4 * 10**9)
    with pytest.raises(InputError, match=r"needs 28.4 GB, 26.0 GB are free: --pp 2 needs 15.1 GB a GPU"):
        model.check("cuda")
    monkeypatch.setattr(memory, "_free_gpu_bytes", lambda *, alone: 29 * 10**9)
    said = r"needs 4.6 GB of the machine's memory for --kv-offload, 4.0 GB are free: --no-kv-offload needs 28.4 GB"
    with pytest.raises(InputError, match=said):
        offload.check("cuda")


def test_too_little_is_said_with_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    free = free_bytes()
    assert free is not None and free > 10**8
    monkeypatch.setattr(memory, "free_bytes", lambda: 24 * 10**9)
    monkeypatch.setattr(memory, "_free_gpu_bytes", lambda *, alone: 24 * 10**9)
    model = _released("magi-4.5b")
    needed = model.total(shared=False) / 1e9
    with pytest.raises(InputError) as caught:
        model.check("cuda")
    said = f"a video of 720x720 pixels and 20 chunks needs {needed:.1f} GB, 24.0 GB are free: "
    assert str(caught.value) == said + "--pp 2 needs 15.1 GB a GPU"
    replace(model, layout=Layout(pp=2)).check("cuda")
    whole = replace(model, kv=KVSettings(budget=9))
    monkeypatch.setattr(memory, "_free_gpu_bytes", lambda *, alone: 40 * 10**9)
    with pytest.raises(InputError, match=r"free: --kv-budget 4 needs .* GB, --pp 2 needs .* GB a GPU"):
        whole.check("cuda")
    monkeypatch.setattr(memory, "free_bytes", lambda: 48 * 10**9)
    with pytest.raises(InputError, match=r"free: --kv-offload needs 26.* GB, --kv-budget 4 needs .* GB, --pp 2 needs"):
        whole.check("cuda")
    monkeypatch.setattr(memory, "free_bytes", lambda: 24 * 10**9)
    with pytest.raises(InputError, match=r"free: ask for a smaller --height and --width"):
        replace(model, layout=Layout(pp=2)).check("cpu")  # where ranks share the memory
