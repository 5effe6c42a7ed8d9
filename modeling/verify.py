"""Verification of what was written: no engine may serve another model than the one meant."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from modeling.architectures import LLAMA, has_o_bias
from modeling.checkpoint import Checkpoint, local_folder
from modeling.heads import head_layout, output_biases, output_projections
from modeling.inspection import read_config
from modeling.loading import load_decoder, load_tokenizer
from modeling.model_files import ADAPTER_WEIGHTS, read_header, stored_tensors, verify_folder
from modeling.steering import Steering, steer
from modeling.streaming import is_held
from settings import ModelError

_O_BIAS = re.compile(r"\.layers\.(?P<layer>\d+)\.self_attn\.o_proj\.bias$")
_FLOAT32_TOLERANCE = 1e-4
_NOISE_FACTOR = 4.0
_ROWS, _LENGTH = 4, 24
SAMPLE = "Hello world, 12 naïve\n  lines. [INST] <s> ok?"


def verify_export(
    out: Path, checkpoint: Checkpoint, steering: Steering, rows: Sequence[list[int]]
) -> dict[str, float]:
    """Reloads an export and compares it with the model that runs with hooks.

    From the files: config and headers state a Llama with q, k, v and o biases in every layer, and
    each o_proj bias is b_l = W_o delta_l on top of the bias the model had.  Reloaded: each o_proj
    has its file's bias.  On `rows`: the logits are finite and those of the hooked model.

    How far logits may differ:

    - float32: at most 1e-4 x max(1, largest |logit|).  Merging the adapter and adding b_l instead
      of delta_l reorders sums whose terms are rounded to 2^-24 of their size.
    - bfloat16, float16: their RMS difference may be 4 x eps x sqrt(layers) x RMS of the logits
      (each position's mean taken off).  Every layer rounds the residual stream a few times to
      eps / 2 of its size; independent errors add up as the square root of their number.  Where
      the lock's own effect (hooked against unhooked) is 2 x this noise or more, the export must
      also have its effect: the part of the effect found in it, by projection, is within 0.25 of
      1, which rounding, not being along the effect, hardly moves.

    Args:
        out: The exported folder.
        checkpoint: What was exported; its own `steering` plays no part.
        steering: What the export's biases stand for, at all positions.
        rows: Token ids of some texts; each is run on its own, without padding.  Two copies of
            their logits are held.

    Returns:
        Largest and RMS difference, the RMS of the lock's effect, the part of it that the export
        has (where the effect is above noise), the tolerance that applied, the largest logit.

    Raises:
        ModelError: The export isn't the hooked model; what is wrong, and that it must not be
            served.
    """
    if steering.positions != "all":
        raise ModelError(
            f"positions={steering.positions} can't be written as a bias; set defense.form=hooked"
        )
    if not rows or not all(rows):
        raise ModelError("an export is verified on texts of at least one token; give some")
    exported = Checkpoint(str(out), dtype=checkpoint.dtype)
    source = replace(checkpoint, steering=None)
    layers = head_layout(source).layers
    _check_files(exported, layers)
    biases = _read_o_biases(exported)
    _check_values(exported, biases, source, steering)
    _check_tokenizer(exported, source)
    model = load_decoder(source)
    plain = _logits(model, rows)
    with steer(model, steering):
        hooked = _logits(model, rows)
    del model  # Its memory is free again before the export is loaded.
    model = load_decoder(exported)
    for layer, module in enumerate(output_projections(model)):
        if module.bias is not None and not is_held(module.bias):
            continue  # Streamed: it is read from that file.
        if module.bias is None or not torch.equal(module.bias.detach().cpu(), biases[layer]):
            raise _refused(exported, f"loading it drops or changes the bias of layer {layer}")
    return _compare(exported, plain, hooked, _logits(model, rows), layers)


def verify_written(written: Checkpoint, source: Checkpoint, changed: bool) -> dict[str, float]:
    """Loads a repaired model as its users will, and holds it against its files and its source.

    Every tensor that transformers or PEFT made of it must be its file's, to the bit and none left
    out, its tokens those of the source, and its logits on a few random rows finite; they differ
    from the source's where, and only where, something was edited.

    Args:
        written: The repaired model: full weights in a folder, or an adapter.
        source: The model that was repaired.
        changed: Whether an edit is claimed.

    Returns:
        The largest difference of their logits.

    Raises:
        ModelError: It isn't what was meant, and must not be served.
    """
    verify_folder(written.adapter or written.base, "the repaired model")
    if written.adapter is None:
        _check_tokenizer(written, source)
    rows = random_rows(source)
    before = _logits(load_decoder(source), rows)
    model = load_decoder(written)
    _check_tensors(written, model)
    after = _logits(model, rows)
    if not all(bool(row.isfinite().all()) for row in after):
        raise _not_meant(written, "its logits aren't finite")
    apart = [float((a - b).abs().max()) for a, b in zip(after, before, strict=True)]
    if changed != (max(apart) > 0):
        raise _not_meant(
            written,
            "it answers as the model before the repair does"
            if changed
            else "it answers differently although nothing was edited",
        )
    return {"max_difference": max(apart)}


def random_rows(checkpoint: Checkpoint) -> list[list[int]]:
    """Token ids drawn with a fixed seed: two models either compute the same or they don't."""
    generator = torch.Generator().manual_seed(0)
    shape = (_ROWS, _LENGTH)
    size = read_config(checkpoint).vocab_size
    rows: list[list[int]] = torch.randint(size, shape, generator=generator).tolist()
    return rows


def _check_tensors(written: Checkpoint, model: Any) -> None:
    """Each tensor of the files was loaded, and each that was loaded is in the files."""
    if written.adapter is None:
        files, loaded = stored_tensors(Path(written.base)), model.state_dict()
        tied = set(getattr(model, "all_tied_weights_keys", None) or ())
        missing = sorted(set(loaded) - set(files) - tied)
        paths = {name: tensor.path for name, tensor in files.items()}
    else:
        from peft import get_peft_model_state_dict

        path = Path(written.adapter) / ADAPTER_WEIGHTS
        paths = dict.fromkeys(read_header(path)[0], path)
        loaded = get_peft_model_state_dict(model)
        missing = sorted(set(loaded) - set(paths))
    if missing:
        raise _not_meant(written, f"its files lack {missing[0]}")
    for name, path in paths.items():
        if name.endswith(".rotary_emb.inv_freq"):
            continue
        if name in loaded and not is_held(loaded[name]):
            continue  # Streamed: it is read from that file.
        with safe_open(path, framework="pt") as file:
            stored = file.get_tensor(name)
        if name not in loaded or not torch.equal(loaded[name].cpu(), stored.to(loaded[name].dtype)):
            raise _not_meant(written, f"loading it drops or changes {name}")


def _not_meant(written: Checkpoint, what: str) -> ModelError:
    return ModelError(
        f"the repaired model {written.adapter or written.base!r} isn't what was meant: {what}; "
        "don't serve it, and repair again"
    )


def _refused(exported: Checkpoint, what: str) -> ModelError:
    return ModelError(
        f"the export {exported.base!r} isn't the defended model: {what}; don't serve it, delete "
        "it and export again, or set defense.form=hooked"
    )


def _check_files(exported: Checkpoint, layers: int) -> None:
    """The raw config.json counts, and the headers: that is what an engine reads."""
    config = json.loads((Path(exported.base) / "config.json").read_text())
    if config.get("model_type") != LLAMA or config.get("attention_bias") is not True:
        raise _refused(
            exported,
            f"its config.json has model_type={config.get('model_type')!r} and "
            f"attention_bias={config.get('attention_bias')!r}, so engines drop the biases",
        )
    tensors = stored_tensors(Path(exported.base), "export")
    wanted = (
        f"model.layers.{layer}.self_attn.{side}_proj.bias"
        for layer in range(layers)
        for side in "qkvo"
    )
    missing = next((name for name in wanted if name not in tensors), None)
    if missing is not None:
        raise _refused(exported, f"its files lack {missing}, which vLLM would read as noise")


def _read_o_biases(checkpoint: Checkpoint) -> dict[int, Tensor]:
    """{layer: (hidden,) in the file's dtype} of a checkpoint's o_proj biases."""
    biases = {}
    for name, tensor in stored_tensors(local_folder(checkpoint)).items():
        if (match := _O_BIAS.search(name)) is not None:
            with safe_open(tensor.path, framework="pt") as file:
                biases[int(match["layer"])] = file.get_tensor(name)
    return biases


def _check_values(
    exported: Checkpoint, biases: dict[int, Tensor], source: Checkpoint, steering: Steering
) -> None:
    """Each bias is the model's own plus b_l = W_o delta_l, up to rounding in the file's dtype.

    The norm of what is off may be 4 x eps of the terms' norms, and 1e-5 in float32, where the
    order of W_o delta_l's sum counts.
    """
    own = _read_o_biases(source) if has_o_bias(read_config(source)) else {}
    added = output_biases(source, steering.deltas)
    for layer, bias in biases.items():
        zero = torch.zeros(bias.shape)
        terms = own.get(layer, zero).float(), added.get(layer, zero)
        size = sum(float(term.norm()) for term in terms)
        off = float((bias.float() - terms[0] - terms[1]).norm())
        if not off <= max(1e-5, 4 * torch.finfo(bias.dtype).eps) * size:
            raise _refused(
                exported,
                f"the o_proj bias of layer {layer} is off by {off:.3g} from one of {size:.3g}",
            )


def _check_tokenizer(exported: Checkpoint, source: Checkpoint) -> None:
    """The same text gives the same tokens: the class that reads them may follow model_type."""
    if not any(local_folder(source).glob("tokenizer*")):
        return
    old, new = load_tokenizer(source), load_tokenizer(exported)
    if (
        old(SAMPLE)["input_ids"] != new(SAMPLE)["input_ids"]
        or old.chat_template != new.chat_template
        or old.special_tokens_map != new.special_tokens_map
    ):
        raise _refused(exported, "its tokenizer reads a text differently")


def _logits(model: Any, rows: Sequence[list[int]]) -> list[Tensor]:
    """Logits (length, vocabulary) of each row."""
    with torch.inference_mode():
        return [
            model(input_ids=torch.tensor([row], device=model.device), use_cache=False)
            .logits[0]
            .float()
            .cpu()
            for row in rows
        ]


def _compare(
    exported: Checkpoint,
    plain: list[Tensor],
    hooked: list[Tensor],
    baked: list[Tensor],
    layers: int,
) -> dict[str, float]:
    """The figures of `verify_export`, and its verdict on them."""
    for name, logits in (("hooked", hooked), ("exported", baked)):
        if not all(bool(row.isfinite().all()) for row in logits):
            raise _refused(exported, f"the {name} model's logits aren't finite")
    difference = [b - h for b, h in zip(baked, hooked, strict=True)]
    effect = [h - p for h, p in zip(hooked, plain, strict=True)]
    rms_logits = _rms([row - row.mean(-1, keepdim=True) for row in hooked])
    noise = torch.finfo(getattr(torch, exported.dtype)).eps * math.sqrt(layers) * rms_logits
    figures = {
        "max_difference": max(float(row.abs().max()) for row in difference),
        "rms_difference": _rms(difference),
        "rms_effect": _rms(effect),
        "max_logit": max(float(row.abs().max()) for row in hooked),
        "tolerance": _NOISE_FACTOR * noise,
    }
    measured = figures["rms_difference"]
    if exported.dtype == "float32":
        figures["tolerance"] = _FLOAT32_TOLERANCE * max(1.0, figures["max_logit"])
        measured = figures["max_difference"]
    if measured > figures["tolerance"]:
        raise _refused(
            exported,
            f"its logits differ by {measured:.3g} from the hooked model's, where rounding explains "
            f"{figures['tolerance']:.3g}",
        )
    if figures["rms_effect"] > 2 * noise:
        # <moved, effect> / <effect, effect>: 1 for the lock, 0 for the model without it.
        moved = [b - p for b, p in zip(baked, plain, strict=True)]
        squares = sum(float(row.double().square().sum()) for row in effect)
        inner = sum(float((m.double() * e).sum()) for m, e in zip(moved, effect, strict=True))
        share = figures["effect_share"] = inner / squares
        if abs(share - 1) > 0.25:
            raise _refused(exported, f"it has {share:.2f} of the lock's effect instead of 1")
    return figures


def _rms(rows: list[Tensor]) -> float:
    squares = sum(float(row.double().square().sum()) for row in rows)
    return math.sqrt(squares / sum(row.numel() for row in rows))
