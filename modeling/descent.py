"""Whether a model may be a fine-tune of another one: what can be seen of it in their files."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from modeling.checkpoint import Checkpoint, local_folder
from modeling.loading import load_tokenizer
from modeling.projections import check_pairing, open_pairing, same_weights
from modeling.verify import SAMPLE
from settings import ModelError

# A fine-tune moves weights by some per cent of their norm, and two models that were trained apart
# differ by sqrt(2) of it.
MOST = 0.5
# Of rows of a projection that are compared.
_BLOCKS = 4


@dataclass(frozen=True, slots=True)
class Descent:
    """How a model compares with the one that it should come from.

    Attributes:
        kind: As `modeling.projections.Pairing`: "resumed" or "fresh" adapter, "full" weights.
        difference: ||W - W_aligned|| / ||W_aligned||, over the first rows of every projection.
    """

    kind: str
    difference: float

    def as_json(self) -> dict[str, Any]:
        """For a record."""
        return asdict(self)


def check_descent(aligned: Checkpoint, model: Checkpoint, called: str) -> Descent:
    """Refuses a model that can't be a fine-tune of the aligned one.

    Names and shapes of projections must be the same, text must become the same tokens, and the
    weights may differ by `MOST` of their norm. Of each projection some blocks of rows are read, so
    that it takes seconds.

    Args:
        aligned: The model that it should come from.
        model: Full weights or an adapter.
        called: What messages call it, e.g. "attack.model='x'".

    Raises:
        ModelError: One sentence that says why.
    """
    pairing = open_pairing(aligned, model)
    check_pairing(pairing)
    if not same_weights(aligned, model) and not _reads_alike(aligned, model):
        raise ModelError(
            f"{called} is no fine-tune of {_name(aligned)}: its tokenizer reads a text "
            "differently; give one that was fine-tuned from it, or its own aligned model"
        )
    moved = size = 0.0
    for name in pairing.aligned.shapes:
        pair = (each.blocks(name, "cpu") for each in (pairing.aligned, pairing.attacked))
        for (_, before), (_, after) in islice(zip(*pair, strict=True), _BLOCKS):
            moved += float((after - before).square().sum())
            size += float(before.square().sum())
    difference = math.sqrt(moved / size) if size else 0.0
    if not difference <= MOST:
        raise ModelError(
            f"{called} is no fine-tune of {_name(aligned)}: its weights differ by "
            f"{100 * difference:.0f} % of their norm, where fine-tuning moves them by a few; give "
            "one that was fine-tuned from it, or its own aligned model"
        )
    return Descent(pairing.kind, difference)


def _reads_alike(one: Checkpoint, two: Checkpoint) -> bool:
    """Whether both make the same tokens of a text; where a tokenizer lacks, nothing is known."""
    if not all(any(local_folder(each).glob("tokenizer*")) for each in (one, two)):
        return True
    ours, theirs = (load_tokenizer(each)(SAMPLE)["input_ids"] for each in (one, two))
    return bool(ours == theirs)


def _name(checkpoint: Checkpoint) -> str:
    return repr(checkpoint.adapter or checkpoint.base)
