"""`python -m unet_diffusion` is the command `unet-diffusion`."""

import sys

from unet_diffusion.cli import main

sys.exit(main())
