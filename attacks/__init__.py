"""What breaks a model's safety: one file or folder per attack."""
