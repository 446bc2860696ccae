"""The command line of a checkout: `python -m saltern.cli`."""

import sys

from saltern.cli import main

if __name__ == "__main__":
    sys.exit(main())
