"""`python -m specrl` is `specrl`."""

import sys

from specrl.cli import main

if __name__ == "__main__":
    sys.exit(main())
