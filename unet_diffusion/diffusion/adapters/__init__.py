"""Small parts that are trained in place of a denoiser, which stays frozen; each kind is a file."""
