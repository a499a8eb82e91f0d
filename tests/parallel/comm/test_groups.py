"""How tensors move is decided once, from the devices of all ranks."""

import threading

import pytest
import torch
import torch.distributed as dist

from parallel.comm.groups import RankDevice, choose_transfer, exchange_devices


def ranks(*places, nccl=True):
    return [RankDevice(host=host, gpu=gpu, nccl=nccl) for host, gpu in places]


@pytest.mark.parametrize(
    ("devices", "transfer"),
    [
        (ranks(("a", "GPU-1"), ("a", "GPU-2")), "nccl"),
        (ranks(("a", "GPU-1"), ("a", "GPU-2"), ("b", "GPU-1"), ("b", "GPU-4")), "nccl"),
        (ranks(("a", "GPU-1"), ("a", "GPU-1")), "host"),
        (ranks(("a", "GPU-1"), ("a", "GPU-2"), ("b", "GPU-3"), ("b", "GPU-3")), "host"),
        (ranks(("a", "GPU-1"), ("b", None)), "host"),
        (ranks(("a", None), ("b", None)), "gloo"),
        (ranks(("a", "GPU-1"), nccl=True), "nccl"),
        (ranks(("a", "GPU-1"), ("a", "GPU-2"), nccl=False), "host"),
    ],
    ids=[
        "a GPU each, whether a process can see one or all",
        "two nodes",
        "two ranks share a GPU",
        "one node has enough, the other not",
        "a node without GPUs",
        "CPUs",
        "one rank",
        "without NCCL",
    ],
)
def test_nccl_is_used_if_every_rank_has_a_gpu_of_its_own(devices, transfer):
    assert choose_transfer(devices) == transfer


def test_all_ranks_read_the_same_devices():
    """Neither LOCAL_WORLD_SIZE nor the number of visible GPUs is asked for."""
    store, read = dist.HashStore(), {}
    threads = [
        threading.Thread(
            target=lambda rank=rank: read.update({rank: exchange_devices(store, rank, 3, torch.device("cpu"))})
        )
        for rank in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert read[0] == read[1] == read[2]
    assert len(read[0]) == 3 and {device.gpu for device in read[0]} == {None}
