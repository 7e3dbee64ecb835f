"""suites/papers."""
