"""Programs that measure speed; run them from the checkout: ``python -m benchmarks.loaders``."""
