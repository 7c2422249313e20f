"""Kernels of a decoding step on a CPU, compiled by Numba when they are first called, and kept on disk."""
