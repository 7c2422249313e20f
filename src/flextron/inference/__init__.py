"""Running fast: the decoder, speculative decoding, and tokens of unequal width."""
