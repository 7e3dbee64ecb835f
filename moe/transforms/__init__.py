"""Changes of a layer's experts that need no training: aggregate (AoE), prune, upcycle."""
