"""From a budget to a sub-network: surrogate of the loss, static router, and how they are trained."""
