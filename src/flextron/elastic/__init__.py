"""What a nested model is: a transformers model whose projections run on their first units only."""
