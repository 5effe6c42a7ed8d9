"""GPU memory of the stages, by arithmetic on a model's shape.

All formulas are bytes. s is the size of a number in the weights' dtype (2 in bfloat16), h the
hidden size, q = heads x head_dim, k = kv_heads x head_dim, f the MLP's width, V the vocabulary,
L the blocks, r a LoRA's rank, P its scalars, T tokens of one forward pass.

Weights: s x all scalars. A LoRA's are float32 whatever the model's dtype is, since PEFT loads and
makes them so: 4 P.

Training: AdamW holds two moments and there is one gradient, each in the dtype of what is trained:
12 P more for a LoRA, 3 s x all scalars for full weights. DPO and KTO hold a frozen copy of the
adapter as the reference: 4 P. What autograd keeps of one block for T tokens, under scaled
dot-product attention with a padding mask (keys and values repeated for every query head):
  LoRA on a frozen model in 16 bits: 8h (two norms in float32), 4 x the inputs of all adapted
    projections (each cast to float32), 4r per adapted projection, s (4q + 3f).
  LoRA in float32: 4 (4h + 4q + 4f), 4r per adapted projection.
  Full weights in 16 bits: 8h + s (4h + 4q + 4f); in float32: 4 (6h + 4q + 4f).
With gradient checkpointing: s h per block, and one block in full. The head: TRL's SFT, DPO and KTO
compute logits in tiles of `LOGIT_TOKENS` x `LOGIT_COLUMNS`, of which two float32 copies are
counted, with the last hidden states and their gradient (8 h T); ORPO and SimPO keep all logits with
two float32 copies and a gradient: (s + 12) V T. Preference methods hold two answers to each row.

Generation: keys and values of a batch at full length, 2 s k L each token; the first pass over the
prompts without gradients: two hidden states and the norm's float32 pair, three MLP widths,
s (2h + 3f) + 8h each token; logits of the last position, 8 V per row.

Streaming (repairs that go through weights matrix by matrix): `STREAMED` float32 copies of the
largest matrix.

Left out: the CUDA context (some 0.5 GB), the allocator's fragmentation (commonly a tenth), work
space of kernels, and the batches themselves. Tests hold the sums for a LoRA and for full weights
against what autograd really keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

from experiments.plan.shape import BYTES, Lora, Shape

FLOAT = 4
# The tiles of TRL's fused head, from its sources (1.16).
LOGIT_TOKENS, LOGIT_COLUMNS = 4096, 32768
# A weight, its edit, the alignment's difference and one temporary.
STREAMED = 4


@dataclass(frozen=True)
class Loaded:
    """A model as a stage loads it.

    Attributes:
        shape: Its shape.
        dtype: Of its weights.
        lora: Its adapter, or None.
    """

    shape: Shape
    dtype: str
    lora: Lora | None = None

    @property
    def size(self) -> int:
        """Bytes of a number of the weights."""
        return BYTES[self.dtype]

    @property
    def adapter_bytes(self) -> int:
        """Bytes of the adapter."""
        return FLOAT * self.lora.parameters if self.lora else 0

    @property
    def bytes(self) -> int:
        """Bytes of weights and adapter."""
        return self.size * self.shape.parameters + self.adapter_bytes


def training(
    model: Loaded, tokens: int, length: int, *, checkpointing: bool, reference: bool, fused: bool
) -> int:
    """Bytes of training a model: its LoRA where it has one, else all weights.

    Args:
        model: What is trained.
        tokens: Tokens of a forward pass, padding included.
        length: Tokens of its longest row.
        checkpointing: Whether activations are computed again.
        reference: Whether a copy of the adapter is held as the reference.
        fused: Whether the head is computed in tiles.
    """
    trained = model.adapter_bytes or model.bytes
    copies = 3 * trained + (model.adapter_bytes if reference else 0)
    block = activations(model, tokens, length)
    kept = model.shape.layers * block
    if checkpointing:
        kept = model.shape.layers * model.size * model.shape.hidden * tokens + block
    return model.bytes + copies + kept + head(model, tokens, fused=fused)


def activations(model: Loaded, tokens: int, length: int) -> int:
    """What autograd keeps of one block; see the module."""
    shape, size = model.shape, model.size
    h, q, f = shape.hidden, shape.attention, shape.intermediate
    if model.lora is None:
        each = 8 * h + size * (4 * h + 4 * q + 4 * f) if size < FLOAT else FLOAT * (6 * h + 4 * q)
        each += 0 if size < FLOAT else FLOAT * 4 * f
    else:
        modules = model.lora.modules.values()
        each = FLOAT * model.lora.rank * len(modules) // shape.layers
        if size < FLOAT:
            inputs = sum(d_in for _, d_in in modules) // shape.layers
            each += 8 * h + FLOAT * inputs + size * (4 * q + 3 * f)
        else:
            each += FLOAT * (4 * h + 4 * q + 4 * f)
    # The norms' and the attention's own statistics, and the padding mask.
    each += 2 * FLOAT + FLOAT * shape.heads + size * length
    return tokens * each


def head(model: Loaded, tokens: int, *, fused: bool) -> int:
    """The logits and their loss; see the module."""
    if not fused:
        return (model.size + 3 * FLOAT) * model.shape.vocabulary * tokens
    columns = min(LOGIT_COLUMNS, model.shape.vocabulary)
    tiles = 2 * FLOAT * min(tokens, LOGIT_TOKENS) * columns
    return tiles + 2 * FLOAT * model.shape.hidden * tokens


def forward(model: Loaded, tokens: int, rows: int) -> int:
    """Bytes of a pass without gradients over `tokens`, with the logits of `rows` positions."""
    shape = model.shape
    each = model.size * (2 * shape.hidden + 3 * shape.intermediate) + 2 * FLOAT * shape.hidden
    return tokens * each + 2 * FLOAT * shape.vocabulary * rows


def cache(model: Loaded, tokens: int) -> int:
    """Keys and values of so many tokens."""
    shape = model.shape
    return 2 * model.size * shape.kv_heads * shape.head_dim * shape.layers * tokens


def generation(model: Loaded, rows: int, prompt: int, answer: int) -> int:
    """Bytes of generating a batch.

    Args:
        model: What generates.
        rows: Prompts of a batch.
        prompt: Tokens of the longest prompt.
        answer: Most tokens of an answer.
    """
    return (
        model.bytes + cache(model, rows * (prompt + answer)) + forward(model, rows * prompt, rows)
    )


def streaming(model: Loaded) -> int:
    """Bytes of going through a model's matrices one after another."""
    return STREAMED * FLOAT * model.shape.largest
