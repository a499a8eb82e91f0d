"""Which model is meant and where its weights are, what it takes of memory, and what a folder of weights holds."""
