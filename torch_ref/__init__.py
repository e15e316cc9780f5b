"""The operation for PyTorch: an eager reference, and the Triton kernel that `pallas_qk` has to equal in bits.

`torch_ref.reference` needs torch, `torch_ref.triton_oracle` torch and Triton. Neither imports JAX.
"""
