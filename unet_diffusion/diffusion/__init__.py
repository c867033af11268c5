"""Diffusion: schedule, losses, sampling, guidance, and what images are conditioned on."""
