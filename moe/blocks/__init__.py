"""Floating-point, codebook, GGUF, ternary and binary codecs."""
