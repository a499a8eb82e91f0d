"""Wan's causal descendants: SkyReels-V2 by diffusion forcing, and Self-Forcing."""
