"""Expert offload: a model's experts in a slow tier, some of them in slots of a fast one, and who decides which."""
