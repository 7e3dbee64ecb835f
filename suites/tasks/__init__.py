"""Tasks for lm-eval that need no download: made from a seed or from the text of the package, and their evaluation."""
