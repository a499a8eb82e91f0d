"""Seats from the environment."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from models.errors import InputError
from parallel.ranks.environment import RankEnv, child_environment, listening_at

ROOT = Path(__file__).parents[3]
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node7",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RESTART_COUNT": "2",
}


def test_a_process_alone_has_no_env():
    assert RankEnv.from_environment({"PATH": "/bin"}) is None


def test_torchrun_tells_everything():
    assert RankEnv.from_environment(TORCHRUN) == RankEnv(
        rank=3,
        world_size=8,
        local_rank=1,
        host="node7",
        port=29500,
        torchrun=True,
        attempt=2,
    )


def test_without_torchrun_rank_0_serves():
    plain = {name: TORCHRUN[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    env = RankEnv.from_environment(plain)
    assert not env.launcher_serves


@pytest.mark.parametrize("name", ["LOCAL_RANK", "MASTER_ADDR", "WORLD_SIZE"])
def test_a_missing_variable_is_named(name):
    with pytest.raises(InputError, match=f"lacks {name}"):
        RankEnv.from_environment({key: value for key, value in TORCHRUN.items() if key != name})


def test_a_variable_that_is_no_number_is_named():
    with pytest.raises(InputError, match="MASTER_PORT is 'high'"):
        RankEnv.from_environment({**TORCHRUN, "MASTER_PORT": "high"})


def test_a_child_finds_the_env_that_it_was_given():
    env = RankEnv(rank=1, world_size=2, local_rank=1, host="here", port=7, secret="x", launcher_serves=True, attempt=4)
    given = child_environment(env, threads=3)
    assert RankEnv.from_environment(given) == env
    assert given["OMP_NUM_THREADS"] == "3"
    assert given["PATH"] == os.environ["PATH"]


def test_reading_an_env_needs_no_torch():
    modules = "parallel.ranks.environment, parallel.mesh"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_where_libraries_listen_is_not_left_behind(monkeypatch):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")  # what the user has set stays
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    with pytest.raises(ValueError), listening_at("lo"):
        assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("lo", "ib0")
        raise ValueError
    assert "GLOO_SOCKET_IFNAME" not in os.environ and os.environ["NCCL_SOCKET_IFNAME"] == "ib0"
    with listening_at(None):
        assert "GLOO_SOCKET_IFNAME" not in os.environ
