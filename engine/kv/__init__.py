"""Keys and values of a request: one allocation per layer at admission, nothing grows with the length of the video."""

from engine.kv.buffer import KVBuffer
from engine.kv.layout import KVLayout

__all__ = ["KVBuffer", "KVLayout"]
