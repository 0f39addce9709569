"""``python -m lumix_dali``: the command ``lumix-dali``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
