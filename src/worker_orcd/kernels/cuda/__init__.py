"""CUDA kernels, written in Triton. Nothing here is imported before a GPU, or its compiler, is asked for."""
