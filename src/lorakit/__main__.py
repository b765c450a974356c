"""`python -m lorakit` is the command line."""

import sys

from lorakit.cli import main

if __name__ == "__main__":
    sys.exit(main())
