"""Fast inference: the decoder, speculative decoding, and widths per token."""
