"""How a person starts it: command line, presets, progress, video files."""

__version__ = "0.1.0"
