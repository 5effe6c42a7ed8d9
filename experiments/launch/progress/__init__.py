"""How far a sweep is; `python -m experiments.progress SWEEP` shows it in any terminal."""
