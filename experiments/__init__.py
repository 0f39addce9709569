"""The paper's tables at a small scale: ablations and methods of mixing."""
