"""Runs `pipelines.segmentation`: `python -m pipelines.segment train` and `evaluate`."""

import sys

from .segmentation.cli import main

if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"python -m pipelines.segment: {error}")
