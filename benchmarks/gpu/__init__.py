"""What one GPU does, by one command: `python -m benchmarks.gpu --out DIR`.

Weights are random and nothing is downloaded. It runs in a plain checkout with torch, numpy, safetensors, pydantic,
typer, rich and matplotlib: what it imports needs neither PyAV nor Ray nor transformers.
"""
