"""From images to latents and back, and the store of encoded images."""
