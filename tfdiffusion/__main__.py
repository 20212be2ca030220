"""`python -m tfdiffusion`, the same as the command `tfdiffusion`."""

import sys

from tfdiffusion.cli import main

if __name__ == "__main__":
    sys.exit(main())
