"""Saved experiments: lists of (suite, overrides) blocks that make one plan."""
