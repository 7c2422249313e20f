"""The token router: from a budget to widths for every token."""
