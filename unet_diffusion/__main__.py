"""`python -m unet_diffusion` is the command `unet-diffusion`."""

import os
import sys

if __name__ == "__main__":
    if not sys.flags.safe_path and sys.path[0] == os.getcwd():
        sys.path.pop(0)  # the current folder, which may be that of somebody's images: its files are no modules of ours
    from unet_diffusion.cli import main

    sys.exit(main())
