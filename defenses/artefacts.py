"""Artefacts of `prepare` in several defenses: token rows, and the check that all is there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from defenses.base import Calibration
from modeling.checkpoint import Checkpoint
from settings import ModelError

if TYPE_CHECKING:
    from modeling.capture import TokenRow

ROWS = "rows.json"


def require_files(artefact: Path, defense: str, *names: str) -> None:
    """Refuses an artefact (ModelError) that lacks a file or folder which `apply` reads."""
    for name in names:
        if not (artefact / name).exists():
            raise ModelError(
                f"{str(artefact)!r} is no artefact of defense={defense} ({name} is missing); "
                "prepare it again"
            )


def prompt_rows(
    calibration: Calibration, model: Checkpoint, texts: Sequence[str]
) -> list[TokenRow]:
    """Prompts as the model sees them, with empty answers."""
    from modeling.loading import load_tokenizer

    tokenizer = load_tokenizer(model)
    return [(calibration.style.encode_prompt(tokenizer, text), []) for text in texts]


def write_rows(artefact: Path, rows: Sequence[TokenRow]) -> None:
    """Writes (prompt ids, answer ids) to the artefact's `ROWS`."""
    (artefact / ROWS).write_text(json.dumps(rows))


def read_rows(artefact: Path) -> list[TokenRow]:
    """The rows of `write_rows`."""
    return [(prompt, answer) for prompt, answer in json.loads((artefact / ROWS).read_text())]
