"""The paper's tables at a small scale: ablations, methods of mixing, and the statistics of paired runs."""
