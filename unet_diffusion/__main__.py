"""`python -m unet_diffusion` is the command `unet-diffusion`."""

import os
import signal
import sys


def main() -> int:
    """The command line of this process; its exit status. Interrupted while it is imported, it ends without a word."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # and not ignored, as in the background of a script
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from unet_diffusion.commands.main import main as run

    signal.signal(signal.SIGINT, before)
    return run()


if __name__ == "__main__":
    if not sys.flags.safe_path and sys.path[0] == os.getcwd():
        sys.path.pop(0)  # the current folder, which may be that of somebody's images: its files are no modules of ours
    sys.exit(main())
