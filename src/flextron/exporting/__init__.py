"""Export one sub-network as a standalone model for another engine; every export is verified before it appears."""
