"""The former name of `python -m train.reap`."""

import sys

from train.cli.arguments import print_error

if __name__ == "__main__":
    sys.exit(print_error("python -m train.tracking.reap is now called python -m train.reap"))
