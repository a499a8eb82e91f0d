"""MAGI-1, exactly as released; all that is particular to it."""
