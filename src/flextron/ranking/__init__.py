"""Ranking units: importance, the permutation that puts the best units first, and sensitivities."""
