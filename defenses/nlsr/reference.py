"""The reference adapter (paper: step 1), and whether a victim shares its LoRA coordinates."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from modeling.lora import LoraAdapter, LoraPair, open_adapter, rewrite_adapter
from settings import SettingError


def amplify(aligned: LoraAdapter, out: Path, scale_a: float, scale_b: float) -> LoraAdapter:
    """Writes the reference adapter e: A_e = scale_a A, B_e = scale_b B.

    The paper's W_e = (1 + beta) W_a - beta W_0 is exact on a LoRA, whose product is W_a - W_0:
    scale_a = 1 and scale_b = 1 + beta.  The official code has 2 alpha for both.
    """

    def scaled(_: str, pair: LoraPair) -> LoraPair:
        return LoraPair(pair.a * scale_a, pair.b * scale_b, pair.scale)

    rewrite_adapter(aligned, out, scaled)
    return open_adapter(out, "the reference adapter")


# Resumed training moves A little (cosine 0.9 and more even after harsh attacks), while two
# independent initialisations of r x d_in scalars have a cosine of about 0 +- 1/sqrt(r d_in).
MIN_COSINE = 0.5

_ADVICE = "set attack.adapter=resume, so that the attack trains the aligned model's own adapter on"


def check_coordinates(aligned: LoraAdapter, attacked: LoraAdapter) -> dict[str, float]:
    """The median and the smallest cosine of two adapters that share coordinates.

    Names, shapes and scales must be equal, and the lora_A matrices, compared by the median over
    modules of their cosine, must point the same way (`MIN_COSINE`); the cosine doesn't see the
    reference's amplification.

    Raises:
        SettingError: `attacked` isn't `aligned` trained on.
    """
    if set(aligned.shapes) != set(attacked.shapes):
        odd = sorted(set(aligned.shapes) ^ set(attacked.shapes))
        raise SettingError(
            f"defense=nlsr needs the attacked adapter to adapt the modules of the aligned one, "
            f"but {odd[0]} is in only one of them; {_ADVICE}"
        )
    for name, shape in aligned.shapes.items():
        if attacked.shapes[name] != shape:
            raise SettingError(
                f"defense=nlsr needs equal shapes and scales, but {name} has {shape} in the "
                f"aligned adapter and {attacked.shapes[name]} in the attacked one; {_ADVICE}"
            )
    cosines = torch.cat(list(_cosines_of_a(aligned, attacked)))
    median = float(cosines.median())
    if not median >= MIN_COSINE:
        raise SettingError(
            f"defense=nlsr needs the attack to resume the aligned adapter, but the lora_A "
            f"matrices of the two are unrelated (median cosine {median:.2f}, at least "
            f"{MIN_COSINE} when resumed); {_ADVICE}"
        )
    return {"median": median, "min": float(cosines.min())}


def _cosines_of_a(aligned: LoraAdapter, attacked: LoraAdapter) -> Iterator[Tensor]:
    for names in aligned.groups():
        (a, _), (other, _) = aligned.stack(names), attacked.stack(names)
        a, other = a.flatten(1).double(), other.flatten(1).double()
        yield torch.nn.functional.cosine_similarity(a, other, dim=1)
