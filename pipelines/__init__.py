"""Programs that train, evaluate and segment; `--help` of each says how."""

import os

# Before PyTorch is imported: idle OpenMP threads that spin slow everything down where another process is running.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
