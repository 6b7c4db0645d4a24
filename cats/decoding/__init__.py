"""Greedy decoding as one CUDA graph a token, for dense and sparse models alike."""
