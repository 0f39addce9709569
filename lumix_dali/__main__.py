"""``python -m lumix_dali``: the ``lumix-dali`` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
