"""A defense without an experiment: prepared once, applied to any number of fine-tunes."""
