"""One U-Net, from segmentation to latent diffusion."""
