"""Turns `python -m pa_ops` into the command `pa-ops`."""

import sys

from pa_ops.cli import main

if __name__ == "__main__":
    sys.exit(main())
