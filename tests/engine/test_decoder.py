"""Decoding beside denoising."""

import threading

import pytest
import torch

from engine.decoder import Decoder, DecoderHung

CPU = torch.device("cpu")


class Slow:
    """Decodes when it is allowed to."""

    def __init__(self):
        self.allowed = threading.Semaphore(0)

    def stream(self):
        return self.decode

    def decode(self, latents):
        assert not torch.is_grad_enabled()
        self.allowed.acquire()
        if latents.isnan().any():
            raise ValueError("nothing to see")
        return latents.to(torch.uint8)


@pytest.fixture
def slow():
    return Slow()


def begun(slow, check=lambda: None, **limits):
    decoder = Decoder(CPU, on_decoded=lambda began: None, check=check, **limits)
    for video in range(2):
        decoder.begin(video, slow)
    return decoder


@pytest.fixture
def decoder(slow):
    made = begun(slow)
    yield made
    slow.allowed.release(100)
    made.close()


def test_chunks_of_a_video_come_in_order_and_videos_do_not_wait_for_each_other(slow, decoder):
    for request, index in [(0, 0), (1, 0), (0, 1)]:
        decoder.put(request, index, torch.full((1,), float(10 * request + index)))
    assert decoder.get(0, wait=False) is None
    assert decoder.pending(0) and decoder.pending(1) and not decoder.pending(2)
    slow.allowed.release(3)
    second = decoder.get(1, wait=True)
    assert (second.index, second.frames.item()) == (0, 10)
    first = [decoder.get(0, wait=True) for _ in range(2)]
    assert [(chunk.index, chunk.frames.item()) for chunk in first] == [(0, 0), (1, 1)]
    assert decoder.get(0, wait=True) is None
    assert not decoder.pending(0)


def test_an_error_reaches_whoever_waits(slow, decoder):
    decoder.put(0, 0, torch.tensor([float("nan")]))
    slow.allowed.release()
    with pytest.raises(ValueError, match="nothing to see"):
        decoder.get(0, wait=True)


def test_what_nobody_wants_is_dropped(slow, decoder):
    decoder.put(0, 0, torch.zeros(1))
    slow.allowed.release()
    while decoder.get(0, wait=False) is None:
        pass
    decoder.put(0, 1, torch.zeros(1))
    decoder.forget(0)
    slow.allowed.release()
    decoder.put(1, 0, torch.ones(1))
    slow.allowed.release()
    assert decoder.get(1, wait=True).frames.item() == 1


def test_a_video_that_was_forgotten_leaves_nothing(slow, decoder):
    for index in range(3):
        decoder.put(0, index, torch.zeros(1))
    decoder.forget(0)
    slow.allowed.release(3)
    decoder.put(1, 0, torch.ones(1))
    slow.allowed.release()
    assert decoder.get(1, wait=True).index == 0
    assert not decoder._videos


def test_an_autoencoder_that_hangs_is_noticed(slow):
    decoder = begun(slow, limits=(0.3, 0.3))
    decoder.put(0, 0, torch.zeros(1))
    with pytest.raises(DecoderHung, match="has not come on for"):
        decoder.get(0, wait=True)
    with pytest.raises(DecoderHung):
        for index in range(1, 9):  # a full queue does not hang the caller either
            decoder.put(0, index, torch.zeros(1))
    slow.allowed.release(100)
    decoder.close()


def test_whoever_waits_hears_of_a_failure_elsewhere(slow):
    failed = []

    def check():
        if failed:
            raise RuntimeError("rank 1 has gone")

    decoder = begun(slow, check)
    decoder.put(0, 0, torch.zeros(1))
    threading.Timer(0.1, failed.append, [True]).start()
    with pytest.raises(RuntimeError, match="rank 1 has gone"):
        decoder.get(0, wait=True)
    slow.allowed.release()
    decoder.close()
