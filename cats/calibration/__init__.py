"""One pass over text that measures gate activations, for thresholds at every sparsity."""
