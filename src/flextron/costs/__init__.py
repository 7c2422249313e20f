"""Everything with a price: cost tables, measured latency, and budgets as ceilings."""
