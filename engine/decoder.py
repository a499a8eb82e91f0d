"""Decoding beside denoising: finished latents go to a thread, frames come out per video in order."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from engine.engine import Chunk
from models.protocols import Autoencoder

_AHEAD = 4
"""Chunks that wait to be decoded before denoising is held up."""


class Decoder:
    """A thread with an autoencoder. On a GPU it has a stream of its own.

    Args:
        autoencoder: latents to frames.
        on_decoded: called in the thread when a chunk is decoded, with `time.perf_counter()` at its start.
        device: where the latents are.
    """

    def __init__(self, autoencoder: Autoencoder, on_decoded: Callable[[float], None], device: torch.device) -> None:
        self._autoencoder, self._on_decoded, self._device = autoencoder, on_decoded, device
        self._waiting: queue.Queue[tuple[int, int, Tensor] | None] = queue.Queue(_AHEAD)
        self._changed = threading.Condition()
        self._made: dict[int, deque[Chunk]] = {}
        self._left: dict[int, int] = {}
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="decoder", daemon=True)
        self._thread.start()

    def put(self, request: int, index: int, latents: Tensor) -> None:
        """Hand over a finished chunk [1, C, t, h, w]; waits while too many are undecoded."""
        with self._changed:
            self._left[request] = self._left.get(request, 0) + 1
        self._waiting.put((request, index, latents))

    def get(self, request: int, *, wait: bool) -> Chunk | None:
        """The next decoded chunk of a request; None if it has none (left, if `wait`).

        Raises:
            Exception: what decoding has raised.
        """
        with self._changed:
            while True:
                if self._error is not None:
                    raise self._error
                made = self._made.get(request)
                if made:
                    return made.popleft()
                if not wait or not self._left.get(request):
                    return None
                self._changed.wait()

    def pending(self, request: int) -> bool:
        """Whether chunks of a request are still to be decoded or taken."""
        with self._changed:
            return bool(self._left.get(request) or self._made.get(request))

    def forget(self, request: int) -> None:
        """Nobody wants the rest of a request's chunks."""
        with self._changed:
            self._made.pop(request, None)

    def close(self) -> None:
        """End the thread, after what it has been given."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        while (given := self._waiting.get()) is not None:
            request, index, latents = given
            try:
                frames = None if self._error else self._decode(latents, stream)
            except Exception as error:  # noqa: BLE001 - shown to whoever asks for the frames
                frames = None
                with self._changed:
                    self._error = error
            with self._changed:
                if frames is not None:
                    self._made.setdefault(request, deque()).append(Chunk(index=index, latents=latents, frames=frames))
                self._left[request] -= 1
                if not self._left[request]:
                    del self._left[request]
                self._changed.notify_all()

    @torch.no_grad()
    def _decode(self, latents: Tensor, stream: torch.cuda.Stream | None) -> Tensor:
        began = time.perf_counter()
        if stream is None:
            frames = self._autoencoder.decode(latents)
        else:
            stream.wait_stream(torch.cuda.default_stream(self._device))
            with torch.cuda.stream(stream):
                frames = self._autoencoder.decode(latents)
            stream.synchronize()
        self._on_decoded(began)
        return frames
