"""Accuracy of sub-networks on the paper's tasks, by lm-eval."""
