"""Reproduces the demo model: corpus, tokenizer, data, training, evaluation of generated tasks."""
