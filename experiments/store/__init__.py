"""The stage store; `python -m experiments.store` lists, prunes and verifies it."""

from experiments.store.manifest import MANIFEST
from experiments.store.stages import Stage, StageResult, Store

__all__ = ["MANIFEST", "Stage", "StageResult", "Store"]
