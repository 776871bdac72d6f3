"""Rows through a model, with gradient: log-probabilities, scores, and how batches are cut into parts."""
