"""`python -m qwenedit`."""

import sys

from qwenedit.cli.options import main

if __name__ == "__main__":
    sys.exit(main())
