"""Judges: what reads an answer and says whether it is safe."""
