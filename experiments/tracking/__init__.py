"""Weights & Biases: a run for every experiment, a summary for a sweep."""
