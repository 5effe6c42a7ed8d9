"""The stage store; `python -m experiments.store` lists, prunes and verifies it."""

from experiments.store.stages import MANIFEST, Stage, StageResult, Store

__all__ = ["MANIFEST", "Stage", "StageResult", "Store"]
