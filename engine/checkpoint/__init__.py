"""Checkpoints of a video: what they hold, how they are written, when they are whole."""
