"""Programs that measure speed and accuracy; run them from the checkout: ``python -m benchmarks.loaders``."""
