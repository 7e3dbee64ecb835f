"""suites/models."""
