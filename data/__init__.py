"""What is read: row types, sources, prompts, mixtures and the leakage check."""
