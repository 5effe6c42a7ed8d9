"""Jobs on machines: one run, a sweep, what watches it, and where its jobs run."""
