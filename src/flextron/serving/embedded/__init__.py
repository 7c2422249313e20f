"""The engine inside the server: mixed levels in one batch, over transformers' models."""
