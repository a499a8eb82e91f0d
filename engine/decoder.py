"""Decoding beside denoising: finished latents go to a thread, frames come out per video in order.

On a GPU the thread has a stream of its own, which waits for the latents and for nothing that was launched after them;
frames and latents are copied to the host on it, so they do not queue behind the layers.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from models.protocols import Autoencoder, RememberingStream

_AHEAD = 4  # chunks that wait to be decoded before denoising is held up
_CHECK_SECONDS = 0.25  # between two looks whether decoding has failed or hangs
Stream = Callable[[Tensor], Tensor]
"""As of `Autoencoder.stream`."""
_LIMITS = (900.0, 180.0)  # seconds to decode the first chunk, whose kernels may be compiled, and any other


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A finished chunk. Its tensors are on the CPU; without frames, the latents are on the model's device."""

    index: int  # 0 for the first that is handed out
    latents: Tensor  # [1, C, t, h, w] fp32
    frames: Tensor | None  # uint8 [F, H, W, 3]; None where frames are not wanted


class DecoderHung(Exception):  # noqa: N818 - reads as what it says
    """The autoencoder has been at one chunk for too long."""


class Decoder:
    """Decodes on a thread, which begins with the first chunk."""

    def __init__(
        self,
        device: torch.device,  # of the latents
        *,
        on_decoded: Callable[[float], None],  # in the thread after each chunk, with `perf_counter()` at its start
        check: Callable[[], None],  # called while the caller waits; raises if the run has failed elsewhere
        limits: tuple[float, float] = _LIMITS,  # seconds of the first chunk and of others
    ) -> None:
        self._device, self._on_decoded, self._check = device, on_decoded, check
        self._limits, self._decoded = limits, 0
        self._began: float | None = None  # the chunk that is decoded now
        self._waiting: queue.Queue[tuple[Future[Chunk], Stream, int, Tensor, torch.cuda.Event | None] | None]
        self._waiting = queue.Queue(_AHEAD)
        self._videos: dict[int, deque[Future[Chunk]]] = {}  # chunks that were not taken
        self._streams: dict[int, Stream] = {}  # of videos that were begun and are not forgotten
        self._primed: dict[int, Future[Chunk]] = {}  # what comes before a video's first chunk
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def begin(self, video: int, autoencoder: Autoencoder) -> None:
        """Chunks of a video come next, for this autoencoder to decode."""
        self._streams[video] = autoencoder.stream()

    def put(self, video: int, index: int, latents: Tensor) -> None:
        """Have a finished chunk [1, C, t, h, w] decoded; waits while too many are undecoded, and raises as `get`.

        The chunks of a video come in order; after its last one it is to be forgotten.
        """
        chunk = Future[Chunk]()
        self._videos.setdefault(video, deque()).append(chunk)
        self._enqueue(chunk, video, index, latents)

    def prime(self, video: int, latents: Tensor) -> None:
        """Let a video that remembers see what comes before its first chunk, [1, C, t, h, w]; its frames are dropped."""
        if isinstance(self._streams[video], RememberingStream):
            self._primed[video] = Future[Chunk]()
            self._enqueue(self._primed[video], video, -1, latents.to(self._device))

    def _enqueue(self, chunk: Future[Chunk], video: int, index: int, latents: Tensor) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="decoder", daemon=True)  # it may hang
            self._thread.start()
        stream, ready = self._streams[video], None
        if self._device.type == "cuda":
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self._device))
        while True:
            try:
                self._waiting.put((chunk, stream, index, latents.detach(), ready), timeout=_CHECK_SECONDS)
                return
            except queue.Full:
                self._check_alive()

    def state(self, video: int) -> dict[str, Tensor]:
        """What the next chunk of a video depends on, empty if nothing; waits until those before it are decoded."""
        stream = self._streams.get(video)
        if not isinstance(stream, RememberingStream):
            return {}
        for chunk in (*filter(None, [self._primed.get(video)]), *self._videos.get(video, ())):
            self._wait(chunk)
        return stream.state()

    def restore(self, video: int, state: Mapping[str, Tensor]) -> None:
        """Go on with a video from a state, before its first chunk."""
        stream = self._streams[video]
        if isinstance(stream, RememberingStream):
            stream.restore(state)

    def get(self, video: int, *, wait: bool) -> Chunk | None:
        """The next decoded chunk of a video; None if it has none (left, if `wait`).

        Raises a DecoderHung if a chunk does not come out, and whatever decoding has raised.
        """
        self._check_alive()
        if not (chunks := self._videos.get(video)):
            return None
        if wait:
            self._wait(chunks[0])
        if not chunks[0].done():
            return None
        chunk = chunks.popleft().result()
        if not chunks:
            del self._videos[video]
        return chunk

    def pending(self, video: int) -> bool:
        """Whether chunks of a video are still to be decoded or taken."""
        return video in self._videos

    def forget(self, video: int) -> None:
        """A video has ended, or nobody wants the rest of its chunks."""
        self._streams.pop(video, None)
        self._primed.pop(video, None)
        for chunk in self._videos.pop(video, ()):
            chunk.cancel()

    def close(self) -> None:
        """End the thread, after what it has been given."""
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join()
            self._thread = None

    def _wait(self, chunk: Future[Chunk]) -> None:
        while not chunk.done():
            with suppress(TimeoutError):
                chunk.exception(_CHECK_SECONDS)
            self._check_alive()

    def _check_alive(self) -> None:
        if self._error is not None:
            raise self._error
        self._check()
        took = 0.0 if (began := self._began) is None else time.perf_counter() - began
        if took > self._limits[bool(self._decoded)]:
            raise DecoderHung(f"decoding of a chunk has not come on for {took:.0f} s")

    def _run(self) -> None:
        queue_of_gpu = None
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
            queue_of_gpu = torch.cuda.Stream(self._device)
        while (given := self._waiting.get()) is not None:
            chunk, stream, index, latents, ready = given
            if self._error is not None or not chunk.set_running_or_notify_cancel():
                continue
            try:
                chunk.set_result(self._decode(stream, index, latents, ready, queue_of_gpu))
            except BaseException as error:  # noqa: BLE001 - raised where the frames are asked for
                self._error = error
                chunk.set_exception(error)

    @torch.no_grad()
    def _decode(
        self,
        stream: Stream,
        index: int,
        latents: Tensor,
        ready: torch.cuda.Event | None,
        queue_of_gpu: torch.cuda.Stream | None,
    ) -> Chunk:
        self._began = began = time.perf_counter()
        if queue_of_gpu is None or ready is None:
            frames = stream(latents)
        else:
            queue_of_gpu.wait_event(ready)
            latents.record_stream(queue_of_gpu)
            with torch.cuda.stream(queue_of_gpu):
                frames, latents = stream(latents).cpu(), latents.cpu()
        self._on_decoded(began)
        self._began, self._decoded = None, self._decoded + 1
        return Chunk(index=index, latents=latents, frames=frames)
