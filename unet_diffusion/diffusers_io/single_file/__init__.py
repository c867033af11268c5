"""One-file checkpoints of the layouts of latent diffusion and Stable Diffusion, in and out."""
