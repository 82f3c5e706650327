"""The command `d2r`, also `python -m d2r_fast`."""

import sys

from d2r_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
