"""What segmentation needs beside the network: tiles, border weights, deformations, scores; and the bridge to denoisers.

`unet_diffusion.data` builds on augmentation and labels; `predict` builds on `unet_diffusion.data`.
"""
