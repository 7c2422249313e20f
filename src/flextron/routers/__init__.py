"""Routers, which turn a budget into a sub-network: the static router and the token router."""
