"""Decoding beside denoising: finished latents go to a thread, frames come out per video in order.

On a GPU the thread has a stream of its own, which waits for the latents and for nothing that was launched after them;
frames and latents are copied to the host on it, so they do not queue behind the layers.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.protocols import Autoencoder

_AHEAD = 4
"""Chunks that wait to be decoded before denoising is held up."""
_CHECK_SECONDS = 0.25  # between two looks whether decoding has failed or hangs
FIRST_CHUNK_SECONDS = 900.0  # to decode the first chunk, whose kernels may be compiled
CHUNK_SECONDS = 180.0  # to decode any other


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A finished chunk. Its tensors are on the CPU; without frames, the latents are on the model's device."""

    index: int  # 0 for the first that is handed out
    latents: Tensor  # [1, C, t, h, w] fp32
    frames: Tensor | None  # uint8 [F, H, W, 3]; None where frames are not wanted


class DecoderHung(Exception):  # noqa: N818 - reads as what it says
    """The autoencoder has been at one chunk for too long."""


@dataclass(slots=True)
class _Video:
    left: int = 0  # chunks that are still to be decoded
    ready: deque[Chunk] | None = field(default_factory=deque)  # None once nobody wants them


class Decoder:
    """A thread with an autoencoder."""

    def __init__(
        self,
        autoencoder: Autoencoder,  # latents to frames
        device: torch.device,  # of the latents
        *,
        on_decoded: Callable[[float], None],  # in the thread after each chunk, with `perf_counter()` at its start
        check: Callable[[], None],  # called while the caller waits; raises if the run has failed elsewhere
        limits: tuple[float, float] = (FIRST_CHUNK_SECONDS, CHUNK_SECONDS),  # seconds of the first chunk and of others
    ) -> None:
        self._autoencoder, self._device, self._on_decoded, self._check = autoencoder, device, on_decoded, check
        self._waiting: queue.Queue[tuple[int, int, Tensor, torch.cuda.Event | None] | None] = queue.Queue(_AHEAD)
        self._changed, self._limits, self._decoded = threading.Condition(), limits, 0
        self._videos: dict[int, _Video] = {}
        self._error: BaseException | None = None
        self._began: float | None = None
        self._thread = threading.Thread(target=self._run, name="decoder", daemon=True)
        self._thread.start()

    def put(self, video: int, index: int, latents: Tensor) -> None:
        """Have a finished chunk [1, C, t, h, w] decoded; waits while too many are undecoded, and raises as `get`."""
        with self._changed:
            held = self._videos.setdefault(video, _Video())
            held.left += 1
        latents, ready = latents.detach(), None
        if self._device.type == "cuda":
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self._device))
        while True:
            try:
                self._waiting.put((video, index, latents, ready), timeout=_CHECK_SECONDS)
                return
            except queue.Full:
                self._check_alive()

    def get(self, video: int, *, wait: bool) -> Chunk | None:
        """The next decoded chunk of a video; None if it has none (left, if `wait`).

        Raises a DecoderHung if a chunk does not come out, and whatever decoding has raised.
        """
        with self._changed:
            while True:
                self._check_alive()
                held = self._videos.get(video)
                if held is None:
                    return None
                if held.ready or not wait or not held.left:
                    chunk = held.ready.popleft() if held.ready else None
                    self._forget_if_done(video)
                    return chunk
                self._changed.wait(_CHECK_SECONDS)

    def pending(self, video: int) -> bool:
        """Whether chunks of a video are still to be decoded or taken."""
        with self._changed:
            held = self._videos.get(video)
            return held is not None and bool(held.left or held.ready)

    def forget(self, video: int) -> None:
        """Nobody wants the rest of a video's chunks."""
        with self._changed:
            if (held := self._videos.get(video)) is not None:
                held.ready = None
                self._forget_if_done(video)

    def close(self) -> None:
        """End the thread, after what it has been given."""
        self._waiting.put(None)
        self._thread.join()

    def _forget_if_done(self, video: int) -> None:
        held = self._videos[video]
        if not held.left and not held.ready:
            del self._videos[video]

    def _check_alive(self) -> None:
        if self._error is not None:
            raise self._error
        self._check()
        took = 0.0 if (began := self._began) is None else time.perf_counter() - began
        if took > self._limits[bool(self._decoded)]:
            raise DecoderHung(f"decoding of a chunk has not come on for {took:.0f} s")

    def _run(self) -> None:
        stream = None
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
            stream = torch.cuda.Stream(self._device)
        while (given := self._waiting.get()) is not None:
            video, index, latents, ready = given
            chunk = None
            try:
                if self._error is None and self._videos[video].ready is not None:
                    chunk = self._decode(index, latents, ready, stream)
            except BaseException as error:  # noqa: BLE001 - raised where the frames are asked for
                self._error = error
            with self._changed:
                held = self._videos[video]
                held.left -= 1
                if chunk is not None and held.ready is not None:
                    held.ready.append(chunk)
                if held.ready is None:
                    self._forget_if_done(video)
                self._changed.notify_all()

    @torch.no_grad()
    def _decode(
        self, index: int, latents: Tensor, ready: torch.cuda.Event | None, stream: torch.cuda.Stream | None
    ) -> Chunk:
        self._began = began = time.perf_counter()
        if stream is None or ready is None:
            frames = self._autoencoder.decode(latents)
        else:
            stream.wait_event(ready)
            latents.record_stream(stream)
            with torch.cuda.stream(stream):
                frames, latents = self._autoencoder.decode(latents).cpu(), latents.cpu()
        self._on_decoded(began)
        self._began, self._decoded = None, self._decoded + 1
        return Chunk(index=index, latents=latents, frames=frames)
