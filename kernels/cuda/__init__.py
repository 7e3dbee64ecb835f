"""kernels.cuda."""
