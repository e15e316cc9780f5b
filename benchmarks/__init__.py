"""Kernel times and parity of pallas_qk; `python -m benchmarks --help` lists the commands."""
