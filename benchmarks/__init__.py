"""Benchmarks of the loader, the mixing and the loss."""

import os

# Before torch is imported: OpenMP's threads spin while they wait, which slows everything else on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
