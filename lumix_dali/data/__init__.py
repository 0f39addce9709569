"""Which samples there are, where their bytes lie, and in which order they are read."""
