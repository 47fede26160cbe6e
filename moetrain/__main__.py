"""``python -m moetrain`` is the ``moetrain`` command."""

import sys

from moetrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
