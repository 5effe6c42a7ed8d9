"""Generation backends: what turns a checkpoint and prompts into greedy answers."""
