"""Messages between two ranks."""

import json
import threading

import pytest
import torch

from parallel.comm.channel import BufferPool
from parallel.ranks.spawn import run_ranks
from parallel.topology.mesh import Layout
from tests.parallel.on_ranks import command


def test_a_slow_receiver_gets_everything_in_order(tmp_path):
    out = tmp_path / "seen.json"
    run_ranks(command("flood", out, {"layout": {"pp": 2}}), Layout(pp=2), threads=1)
    assert json.loads(out.read_text()) == [[index, 50 + index // 10, float(index)] for index in range(40)]


def test_a_pool_uses_buffers_again():
    pool = BufferPool(torch.device("cpu"), 2)
    first = pool.take((1, 4), torch.float32)
    second = pool.take((1, 4), torch.float32)
    assert first.data_ptr() != second.data_ptr()
    pool.give(first)
    assert pool.take((1, 4), torch.float32).data_ptr() == first.data_ptr()
    pool.give(second)
    other = pool.take((1, 5), torch.float32)
    assert other.shape == (1, 5)


@pytest.mark.parametrize("depth", [1, 3])
def test_a_pool_that_is_empty_waits(depth):
    pool = BufferPool(torch.device("cpu"), depth)
    out = [pool.take((2,), torch.float32) for _ in range(depth)]
    got = threading.Event()
    waiting = threading.Thread(target=lambda: (pool.take((2,), torch.float32), got.set()), daemon=True)
    waiting.start()
    assert not got.wait(0.1)
    pool.give(out[0])
    assert got.wait(5)
