"""Which samples exist, where their bytes are, and the order in which they are read."""
