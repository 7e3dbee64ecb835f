"""suites/conf."""
