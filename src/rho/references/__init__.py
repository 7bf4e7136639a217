"""References other than a model with the corpus's own tokenizer."""
