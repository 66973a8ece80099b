"""Triton kernels of the ops, for CUDA tensors. Imported only when one is computed: Triton is not needed on a CPU."""
