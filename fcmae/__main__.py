"""`python -m fcmae`, for torchrun and for environments without the script."""

import sys

from fcmae.cli import main

if __name__ == "__main__":
    sys.exit(main())
