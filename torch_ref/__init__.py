"""The operation and the write to a KV cache for PyTorch: an eager reference, and Triton kernels.

`pallas_qk` has to equal the kernels in bits.
`torch_ref.reference` needs torch, `torch_ref.triton_oracle` torch and Triton. Neither imports JAX.
"""
