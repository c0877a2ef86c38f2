"""`python -m tdsl`: the command line."""

import sys

from tdsl.cli import main

if __name__ == "__main__":
    sys.exit(main())
