"""Make `python -m inco_trio` run the command `inco-trio`."""

import sys

from inco_trio.cli import main

if __name__ == "__main__":
    sys.exit(main())
