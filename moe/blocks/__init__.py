"""Floating-point, codebook, GGUF, ternary and binary codecs, and the quantization of activations per token."""
