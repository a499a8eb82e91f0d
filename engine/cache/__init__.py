"""Chunk-wise reuse: which steps are not computed, and what stands in for them."""

from engine.cache.policy import Decision, Observation, Policy
from engine.cache.reuse import ReuseMemory
from engine.cache.settings import CacheSettings

__all__ = ["CacheSettings", "Decision", "Observation", "Policy", "ReuseMemory"]
