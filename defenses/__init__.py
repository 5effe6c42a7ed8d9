"""Defenses, which bring a model's safety back after fine-tuning: one folder per method."""
