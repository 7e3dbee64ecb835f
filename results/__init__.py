"""Samples in, verdicts out: parts, the database, statistics and export. Knows nothing of how things are measured."""
