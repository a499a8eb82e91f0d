"""What a run leaves: video files, progress on the terminal, summaries, tables."""
