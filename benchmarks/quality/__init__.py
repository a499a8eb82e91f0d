"""What reuse and KV compression save, and what they spoil."""
