"""Memory layers as extreme MoE: rank-1 experts that are found by product keys and read by a gather, not a GEMM."""
