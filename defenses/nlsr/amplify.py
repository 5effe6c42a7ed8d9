"""The safety reference model by pre-amplification (paper: step 1)."""

from __future__ import annotations

from pathlib import Path

from modeling.lora import LoraAdapter, LoraPair, open_adapter, rewrite_adapter


def amplify(aligned: LoraAdapter, out: Path, scale_a: float, scale_b: float) -> LoraAdapter:
    """Writes the reference adapter e: A_e = scale_a A, B_e = scale_b B.

    The paper's W_e = (1 + beta) W_a - beta W_0 is exact on a LoRA, whose product is W_a - W_0:
    scale_a = 1 and scale_b = 1 + beta.  The official code has 2 alpha for both.
    """

    def scaled(_: str, pair: LoraPair) -> LoraPair:
        return LoraPair(pair.a * scale_a, pair.b * scale_b, pair.scale)

    rewrite_adapter(aligned, out, scaled)
    return open_adapter(out, "the reference adapter")
