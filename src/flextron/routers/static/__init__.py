"""The static router: from a budget to one sub-network."""
