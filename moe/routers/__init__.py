"""Routing factories, one file per family: ``build(params)`` returns ``(weights, shape, seed) -> RouterBundle``."""
