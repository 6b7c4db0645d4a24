"""Measured results as files with their origin, and the paper's values beside them."""
