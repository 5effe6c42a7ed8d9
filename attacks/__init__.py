"""Attacks, which break a model's safety: one file or folder each."""
