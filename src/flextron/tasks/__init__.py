"""Measure the accuracy of sub-networks on tasks, with lm-eval."""
