"""Arbitrary-bit kernels: torch references and Triton programs."""
