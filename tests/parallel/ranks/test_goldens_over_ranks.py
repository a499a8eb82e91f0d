"""Published figures over several ranks."""

import json
from pathlib import Path

import pytest

from tests.parallel.on_ranks import start

pytestmark = pytest.mark.slow

GOLDENS = Path(__file__).parents[2] / "data" / "goldens"
PARTS = ("weights", "released_4", "released_24", "released_plain", "released_gated", "released_fp8")  # make no video
CASES = sorted(path for path in GOLDENS.glob("*.safetensors") if not path.stem.startswith(PARTS))
WAN = [
    GOLDENS / "skyreels" / f"{name}.safetensors"
    for name in ("flowcache_fast", "flowcache_compress1", "df_long_sync", "df_causal", "df_teacache_ret")
]
SELF_FORCING = [GOLDENS / "skyreels" / "causal_wan_rolling_sink.safetensors"]  # of two layers and three heads
FEW = [GOLDENS / f"{name}.safetensors" for name in ("flowcache_fast", "t2v_base_cfg3", "v2v_prefix9", "vae")]


@pytest.mark.parametrize(
    ("layout", "split", "files"),
    [
        ({"pp": 2}, None, CASES + WAN + SELF_FORCING),
        ({"pp": 3}, None, FEW + WAN),
        ({"pp": 2}, "1,2", FEW),
        ({"pp": 2, "cp": 2}, None, CASES + WAN),
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
