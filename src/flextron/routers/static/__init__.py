"""The static router: turns a budget into one sub-network."""
