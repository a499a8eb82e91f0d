"""What the engine costs and what its videos look like, measured. Each benchmark is a module to run."""
