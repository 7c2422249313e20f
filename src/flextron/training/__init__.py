"""One run of elastic training."""
