"""Triton kernels of a Mixture-of-Experts layer, and what launches, checks and compiles them."""
