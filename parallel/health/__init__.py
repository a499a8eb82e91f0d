"""Heartbeats, the hang detector, and how one failure ends all ranks with one message."""
