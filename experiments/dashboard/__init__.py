"""A sweep on W&B: its pooled rows as a run of their own, a workspace and a report."""
