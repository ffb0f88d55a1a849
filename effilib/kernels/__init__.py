"""Kernels in C++, compiled by the system's compiler at first use, each with a slower twin in PyTorch."""

__all__ = []
