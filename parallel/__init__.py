"""Where it runs: ranks, stages, and what travels between them."""
