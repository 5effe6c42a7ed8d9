"""What a run or a sweep will cost, said before anything is loaded: `python -m experiments.plan`."""
