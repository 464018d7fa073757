"""``python -m lightning_prune`` is the command ``lightning-prune``."""

import sys

from lightning_prune.cli import main

if __name__ == "__main__":
    sys.exit(main())
