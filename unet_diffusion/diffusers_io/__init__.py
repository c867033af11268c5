"""In and out of diffusers' folders."""
