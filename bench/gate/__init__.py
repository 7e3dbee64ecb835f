"""The gate: two sides of the same cases, measured in the same turns, and a verdict on each."""
