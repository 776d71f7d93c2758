"""The former name of `python -m train.sync`."""

import sys

from train.cli.arguments import print_error

if __name__ == "__main__":
    sys.exit(print_error("python -m train.tracking.sync is now called python -m train.sync"))
