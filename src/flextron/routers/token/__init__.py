"""The token router: turns a budget into widths for every token."""
