"""Kernel times and parity of pallas_qk: `python -m benchmarks run | verify | demo`."""
