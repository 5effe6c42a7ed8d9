"""What is known of a transformer: checkpoints, chat formats, LoRA algebra, training, capture."""
