"""CATS (arXiv 2404.08763): contextually-aware thresholding of gated MLPs, as a library for Hugging Face models."""
