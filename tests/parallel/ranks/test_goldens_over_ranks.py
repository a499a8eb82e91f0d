"""Published figures over several ranks."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from tests.parallel.on_ranks import start

pytestmark = pytest.mark.slow

GOLDENS = Path(__file__).parents[2] / "data" / "goldens"
PARTS = ("weights", "released_4", "released_24", "released_plain", "released_gated", "released_fp8")  # make no video
CASES = sorted(path for path in GOLDENS.glob("*.safetensors") if not path.stem.startswith(PARTS))
FORCING = sorted(GOLDENS.glob("skyreels/df_*")) + sorted(GOLDENS.glob("skyreels/flowcache_*"))
# Of six heads and three layers, where the others have three and two.
SIX_HEADS = [
    GOLDENS / "skyreels" / f"{name}.safetensors"
    for name in (
        *("df_causal", "df_long_sync", "df_start_end", "df_sync_bf16", "df_teacache_noret_odd"),
        *("flowcache_compress1", "flowcache_compress2", "flowcache_fast"),
    )
]
SELF_FORCING = [GOLDENS / "skyreels" / f"causal_wan_{name}.safetensors" for name in ("rolling_sink", "prefix3")]
FEW = [GOLDENS / f"{name}.safetensors" for name in ("flowcache_fast", "t2v_base_cfg3", "v2v_prefix9", "vae")]


@pytest.mark.parametrize(
    ("layout", "split", "files"),
    [
        ({"pp": 2}, None, FEW + FORCING + SELF_FORCING),
        ({"pp": 3}, None, FEW + SIX_HEADS),
        ({"pp": 2}, "1,2", FEW),
        ({"pp": 2, "cp": 2}, None, CASES + SIX_HEADS),
    ],
    ids=["pp 2", "pp 3", "pp 2 the other way round", "pp 2 x cp 2"],
)
def test_goldens_pass_over_ranks(tmp_path, layout, split, files):
    out = tmp_path / "verdicts.json"
    start(out, "goldens", {"split": split, "files": [str(path) for path in files]}, **layout)
    verdicts = json.loads(out.read_text())
    assert [verdict["name"] for verdict in verdicts] == [path.stem for path in files]
    for verdict in verdicts:
        assert verdict["passed"], verdict


def test_a_kept_position_that_is_changed_fails_over_ranks(tmp_path):
    """Kept positions of all ranks' layers and heads are compared."""
    (tmp_path / "weights_fps.safetensors").symlink_to(GOLDENS / "skyreels" / "weights_fps.safetensors")
    path = GOLDENS / "skyreels" / "flowcache_compress1.safetensors"
    with safe_open(path, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    last = "output.keep.iter1.row23.uncond.layer2"
    tensors[last][0, 5] += 1
    save_file(tensors, tmp_path / path.name, metadata)
    start(tmp_path / "out", "goldens", {"split": None, "files": [str(tmp_path / path.name)]}, pp=2, cp=2)
    (verdict,) = json.loads((tmp_path / "out").read_text())
    assert not verdict["passed"] and verdict["detail"].endswith(f"; {last} differs")
