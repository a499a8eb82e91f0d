"""magi-pocket: a small MAGI-1 that is trained here and ships with the project."""
