"""Greedy decoding as one CUDA graph a token, for dense and sparse models alike."""

from cats.decoding import attention
from cats.decoding.graph import Decoder, Generation, decoder_for, greedy, release, timed_greedy

__all__ = ["Decoder", "Generation", "attention", "decoder_for", "greedy", "release", "timed_greedy"]
