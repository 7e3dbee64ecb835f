"""kernels/cuda/shim: what runs the CUDA sources on the CPU."""
