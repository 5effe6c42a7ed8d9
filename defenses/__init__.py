"""What repairs a model's safety after fine-tuning: one folder per method."""
