"""Keys and values of a request: one allocation per layer at admission, nothing grows with the length of the video."""

from engine.kv.buffer import Compression, KVBuffer
from engine.kv.layout import KVLayout
from engine.kv.plan import KVPlan
from engine.kv.selection import SelectionSettings
from engine.kv.settings import KVSettings

__all__ = ["Compression", "KVBuffer", "KVLayout", "KVPlan", "KVSettings", "SelectionSettings"]
