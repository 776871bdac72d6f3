"""Post-training of language models."""
