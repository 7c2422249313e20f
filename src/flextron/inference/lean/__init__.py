"""A few tokens through an elastic model on a CPU, each with its own widths, by compiled kernels."""
