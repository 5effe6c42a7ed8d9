"""Measurements, as ratios within one run where possible; `make bench` runs them all."""
