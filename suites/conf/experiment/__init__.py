"""suites/conf/experiment."""
