"""Programs that time kernels, a layer and decoding, sparse against dense: the subcommands of `cats measure`."""
