"""What units are worth: importance, the permutation that puts the best first, and sensitivities."""
