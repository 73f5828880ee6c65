"""Implementations of the routed experts: Triton, CPU, reference; and which one computes what."""
