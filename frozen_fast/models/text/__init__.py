"""Text towers and their tokenizer."""
