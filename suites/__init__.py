"""What is measured: suites, models, traffic, tasks, papers and the Hydra configuration. Imports no torch."""
