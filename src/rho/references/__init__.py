"""References that are no model with the corpus's own tokenizer in this process: behind an API, of another tokenizer."""
