"""Batches for PyTorch: the DALI pipelines and the loader that runs them."""
