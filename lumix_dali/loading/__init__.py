"""Batches for PyTorch: DALI's pipelines, and the loader that runs them."""
