"""Methods of sparsity: one family that leaves out channels, and baselines that mask at random or mask weights."""
