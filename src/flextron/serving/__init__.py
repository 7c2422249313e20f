"""One server, every latency: requests name their budgets and share one model, one batch and one set of weights."""
