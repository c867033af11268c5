"""The U-Net and its blocks, autoencoders, a discriminator, and how they run."""
