"""The mathematics under test: routing, experts, quantization, sparsity, transforms, metrics and oracle checks."""
