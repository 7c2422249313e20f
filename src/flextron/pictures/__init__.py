"""Drawing, in one place."""
