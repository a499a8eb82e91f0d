"""Keys and values of a request: one allocation per layer at admission, nothing grows with the length of the video."""

from engine.kv.buffer import Compression, KVBuffer, KVState, LayerState
from engine.kv.layout import KVLayout, LayoutState
from engine.kv.plan import KVPlan
from engine.kv.selection import SelectionSettings
from engine.kv.settings import KVSettings

__all__ = [
    "Compression",
    "KVBuffer",
    "KVLayout",
    "KVPlan",
    "KVSettings",
    "KVState",
    "LayerState",
    "LayoutState",
    "SelectionSettings",
]
