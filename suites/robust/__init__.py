"""Tasks of suite ``robustness``: each trains a small model in one way and judges it on data of several kinds."""
