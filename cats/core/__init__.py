"""The method: thresholds, the sparse gated MLP, its place in a Hugging Face model, and its accounting."""
