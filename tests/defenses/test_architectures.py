"""Every defense on every family of models: prepared, applied, written, and loaded again.

A defense is found by its file in conf/defense and a family by its entry in `FAMILIES`, so that a
new one of either kind is covered without an edit here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from _pytest.mark import ParameterSet
from omegaconf import OmegaConf
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from defenses.base import Defense, Models
from defenses.stack import Stack
from modeling.checkpoint import Checkpoint
from modeling.loading import load_model, load_tokenizer
from modeling.model_files import verify_folder
from settings import ModelError, SettingError, build, plain, target
from tests.defenses.victims import Case, harm_calibration, shared_case
from tests.modeling.tiny_models import FAMILIES, UNBAKEABLE, logits

CONF = Path(__file__).resolve().parents[2] / "conf" / "defense"
DEFENSES = sorted(path.stem for path in CONF.glob("*.yaml"))
# What a family's own architecture may break, and families for the others: plain, with biases and
# tied embeddings, and one that no Llama with biases can express.
METHODS = {"nlsr", "safetylock", "fgsn"}
FEW = ("Llama-3.1", "Qwen2.5-tied", "Gemma-2")
TEXT = "5 30 1 12"
# Settings at toy size; a defense that isn't named here runs at its defaults.
TINY: dict[str, dict[str, Any]] = {
    "nlsr": {"calibration_rows": 2, "take_available": True, "prune_rate": 1.0, "delta": 0.0},
    "safetylock": {"n_pairs": 4, "last_tokens": 3, "k": 4, "stability_seeds": 1},
    "fgsn": {"n_pairs": 8, "window": 2},
    "safelora": {"mode": "number", "number": 6},
}
# Alignment as an adapter that the attack resumed, and as full weights under training of all
# weights or under a fresh adapter.
RESUMED, FULL = "resumed/lora", ("full/full", "fresh/full")
_FOLDERS: list[TemporaryDirectory[str]] = []


def cells() -> Iterator[ParameterSet]:
    """(defense, family, kind of attack, dtype): each defense in both forms on every family.

    Of the two kinds on full weights every other cell takes the second, in bfloat16.  A family is
    met through modeling by baselines and by full weights: on all but a few these are slow tests,
    and on those a baseline takes either the adapter or full weights.
    """
    for row, name in enumerate(DEFENSES):
        for column, family in enumerate(FAMILIES):
            second = (row + column) % 2
            for cell in (
                (name, family, RESUMED, ("bfloat16", "float32")[second]),
                (name, family, FULL[second], ("float32", "bfloat16")[second]),
            ):
                resumed = cell[2] == RESUMED
                if family in FEW:
                    quick = name in METHODS or resumed == (row + FEW.index(family)) % 2
                else:
                    quick = name in METHODS and resumed
                yield pytest.param(*cell, marks=() if quick else pytest.mark.slow)


@cache
def built(name: str, form: str | None = None) -> Defense:
    """The defense of conf/defense/NAME.yaml at toy size; a stack with its parts likewise.

    `form` is that of any defense that has one, so that "hooked" is what a refusal advises.
    """
    option = OmegaConf.load(CONF / f"{name}.yaml")
    node = OmegaConf.create({"model": {"presets": {}}, "defense": option})
    OmegaConf.resolve(node)
    values = {**plain(OmegaConf.to_container(node.defense)), **TINY.get(name, {})}
    if values["_target_"] == target(Stack):
        members = tuple(built(part, form) for part in values["order"])
        return Stack.validated({"order": values["order"], "parts": members}, "defense")
    chosen = {"form": form} if form is not None and "form" in values else {}
    return build({**values, **chosen}, "defense", (), Defense)


def parts(defense: Defense) -> Iterator[Defense]:
    """The defense, or those of a stack."""
    yield from defense.parts if isinstance(defense, Stack) else (defense,)


def bakes(defense: Defense) -> bool:
    """Whether what it writes is a Llama with biases."""
    return any(getattr(part, "baked", False) for part in parts(defense))


def fits(defense: Defense, family: str, kind: str) -> bool:
    """Whether it can run on these models."""
    if defense.needs_resumed_adapter and kind != RESUMED:
        return False
    return family not in UNBAKEABLE or not bakes(defense)


@cache
def models_in(family: str, kind: str, dtype: str) -> Case:
    """The models of one kind, run in another precision than their files'."""
    case = shared_case(family, kind)
    checkpoints = case.models.base, case.models.aligned, case.attacked
    base, aligned, attacked = (replace(each, dtype=dtype) for each in checkpoints)
    return Case(Models(base, aligned), attacked)


@cache
def prepared(name: str, form: str | None, family: str, dtype: str, alignment: str) -> Path:
    """The artefact of a defense, made once for all attacks on one aligned model."""
    _FOLDERS.append(TemporaryDirectory())
    folder = Path(_FOLDERS[-1].name)
    models = models_in(family, RESUMED if alignment == "lora" else FULL[0], dtype).models
    built(name, form).prepare(models, harm_calibration(4), folder)
    return folder


def reloaded(checkpoint: Checkpoint) -> list[Tensor]:
    """Logits of a model as transformers and PEFT load it, with hooks of our own for steering."""
    dtype = getattr(torch, checkpoint.dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint.base, dtype=dtype)
    layers = model.model.layers
    if checkpoint.adapter is not None:
        model = PeftModel.from_pretrained(model, checkpoint.adapter)
    if checkpoint.steering is not None:
        deltas = load_file(Path(checkpoint.steering) / "steering.safetensors")
        for layer, delta in deltas.items():
            added = partial(_plus, delta.to(dtype))
            layers[int(layer)].self_attn.o_proj.register_forward_pre_hook(added)
    return logits(model.eval())


def _plus(delta: Tensor, _: object, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0] + delta,)


@cache
def attacked_logits(case: Case) -> list[Tensor]:
    return reloaded(case.attacked)


@pytest.mark.parametrize(("name", "family", "kind", "dtype"), cells())
def test_the_defended_model_is_the_one_that_others_load(
    name: str, family: str, kind: str, dtype: str, tmp_path: Path
) -> None:
    case, form = models_in(family, kind, dtype), None
    defense = built(name, form)
    if not fits(defense, family, kind):
        with pytest.raises((ModelError, SettingError)) as caught:
            defense.check(case.models, case.attacked)
        said = str(caught.value)
        assert "\n" not in said
        if defense.needs_resumed_adapter and kind != RESUMED:
            assert re.search(r"set (attack\.adapter=resume|model\.align)", said)
            return
        assert "set defense.form=hooked" in said
        form = "hooked"
        defense = built(name, form)
    defense.check(case.models, case.attacked)
    artefact = prepared(name, form, family, dtype, kind.partition("/")[2])
    edit = defense.apply(artefact, case.attacked, tmp_path / "out", case.models)
    verify_folder(edit.defended.base, "the defended model")
    verify_folder(edit.defended.adapter or edit.defended.base, "the defended model")
    assert edit.defended.dtype == dtype
    found, before = logits(load_model(edit.defended).eval()), attacked_logits(case)
    for ours, theirs in zip(found, reloaded(edit.defended), strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    moved = max(float((a - b).abs().max()) for a, b in zip(found, before, strict=True))
    assert moved > 1e-4 if edit.parameters_edited else moved == 0
    assert edit.parameters_edited <= edit.parameters_total
    assert bool(edit.parameters_edited) == (name != "none")
    tokens = [load_tokenizer(each)(TEXT)["input_ids"] for each in (case.attacked, edit.defended)]
    assert tokens[0] == tokens[1]
