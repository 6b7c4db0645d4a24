"""Programs that time kernels, a layer and decoding, sparse against dense: what `cats measure` runs."""
