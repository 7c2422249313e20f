"""One sub-network as a model of its own for another engine, which appears only if it computes what it should."""
