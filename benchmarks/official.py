"""The authors' own functions, imported from the user's clones; each returns the step to measure.

What they were written for is put in their place: rows in place of their readers of data sets, the
CPU where there is no CUDA device, what newer transformers has dropped, and two small packages.
Their arithmetic is theirs.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import data
from benchmarks.inputs import Inputs
from benchmarks.ours import Step, counted
from modeling.capture import TokenRow
from modeling.checkpoint import Checkpoint
from modeling.loading import load_model, load_tokenizer

# NLSR's files and functions by method.
_IDENTIFY = {
    "low_rank": ("model_wrapper_low", "make_low_rank"),
    "wanda": ("prune", "prune_wanda"),
    "snip": ("model_wrapper", "prune_wandg"),
    "preference_snip": ("model_wrapper", "prune_preference_wandg"),
}


def identify(inputs: Inputs, method: str) -> Step:
    """NLSR's masking of the reference adapter."""
    file, name = _IDENTIFY[method]
    rows = inputs.rows(counted(inputs, method))
    readers = {
        "get_align": lambda **_: ([_labelled(row) for row in rows], None),
        "get_preference_align": lambda **_: _preferences(rows),
    }
    for reader, read in readers.items():  # The clone's `data` is a module; here it is a package.
        setattr(data, reader, read)
    function = getattr(_module(inputs, "NLSR", f"{file}.py"), name)
    model: Any = load_model(inputs.reference, device=_device())
    model.hf_device_map = {}
    if method == "wanda":
        _give_layers_their_positions(model)
    settings = SimpleNamespace(
        nsamples=len(rows), seed=42, seqlen=0, disentangle=True, data_path="", sparsity_ratio=0.8,
        niter=20, prune_data="align", save="",
        **dict.fromkeys(
            ("top_remove", "dump_U", "prune_part", "neg_prune", "use_diff", "recover_from_base",
             "dump_wanda_score", "use_variant"), False
        ),
    )  # fmt: skip
    tokenizer, device = load_tokenizer(Checkpoint(inputs.reference.base)), torch.device(_device())
    options = {"device": device, "prune_data": "align"}
    return _quietly(lambda: function(settings, model, tokenizer, **options))


def realign(inputs: Inputs) -> Step:
    """NLSR's third step, from files to files."""
    wrapper = _module(inputs, "NLSR", "transfer_inner.py").Lora_inner_Wrapper_Transfer
    masks = inputs.folder / "masks.pt"
    if not masks.exists():
        torch.save(
            {
                f"base_model.model.{name}.lora_{side}.default": mask
                for name, pair in inputs.masks().items()
                for side, mask in zip("AB", pair, strict=True)
            },
            masks,
        )
    attacked = str(inputs.folder / "attacked")

    def step() -> None:
        with tempfile.TemporaryDirectory() as out:
            settings = SimpleNamespace(
                model_path=inputs.reference.base, lora_path=attacked, transfer_lora_path=attacked,
                aligned_path=inputs.reference.adapter, mask_path=masks, output_path=out,
                realign_type="adaptive_mask_replace", tau=None, sparsity_ratio=0.8,
                tau_change_enable=False, epsilon=0.2, prune_rate=0.5, seed=42,
            )  # fmt: skip
            wrapper(settings).adaptive_identify_unsafe_region()

    return _quietly(step)


def prepare_lock(inputs: Inputs) -> Step:
    """SafetyLock's activations, probes and directions, in float32 as ours."""
    locked = _lock_model(inputs, "heads")
    rows = [
        {
            "question": pair.prompt,
            "answer_matching_behavior": pair.chosen,
            "answer_not_matching_behavior": pair.rejected,
        }
        for pair in inputs.pairs()
    ]

    def step() -> None:
        activations = locked.preprocess_activate_dataset(rows, "", last_token_for_get_activate=5)
        labels = [int(at % 10 < 5) for at in range(len(activations))]
        locked.get_activations(activations, labels, num_to_intervene=24)

    return _quietly(step)


def safelora(inputs: Inputs, rank: int, tau: float) -> Step:
    """SafeLoRA's projection; its models are read in the step, as ours are."""
    module = _module(inputs, "SafeLoRA", "model.py")
    module.AutoModelForCausalLM = SimpleNamespace(
        from_pretrained=lambda name, **_: AutoModelForCausalLM.from_pretrained(name)
    )
    aligned = str(inputs.folder / "aligned")
    model = AutoModelForCausalLM.from_pretrained(aligned)
    tuned = PeftModel.from_pretrained(model, str(inputs.folder / f"tuned{rank}"))
    settings = SimpleNamespace(
        base_model_path=str(inputs.folder / "base"), aligned_model_path=aligned, threshold=tau,
        select_layers_type="threshold", num_proj_layers=0, devices=_device(),
    )  # fmt: skip
    return _quietly(lambda: module.SafeLoRA(tuned, settings))


def _module(inputs: Inputs, project: str, file: str) -> ModuleType:
    """A file of a clone, the folder that it lies in on the path behind all others."""
    assert inputs.official is not None
    found = sorted((inputs.official / project).rglob(file), key=lambda path: len(path.parts))
    if not found:
        raise SystemExit(f"{inputs.official / project} has no {file}; clone {project} there")
    sys.path.append(str(found[0].parent))
    return importlib.import_module(found[0].stem)


def _lock_model(inputs: Inputs, name: str) -> Any:
    assert inputs.official is not None
    for package, stand_in in (("einops", _EINOPS), ("baukit", _BAUKIT)):
        if package not in sys.modules and importlib.util.find_spec(package) is None:
            sys.modules[package] = stand_in
    folder = next((inputs.official / "SafetyLock").rglob("model_utils"))
    sys.path.append(str(folder.parent))
    # Its own file was written for another transformers; `head_out` is what it adds.
    stand_in = ModuleType("model_utils.modeling_llama")
    stand_in.LlamaForCausalLM = _WithHeads  # type: ignore[attr-defined]
    sys.modules["model_utils.modeling_llama"] = stand_in
    locked, tokenizer = importlib.import_module("model_utils").get_model(str(inputs.folder / name))
    tokenizer.apply_chat_template = partial(tokenizer.apply_chat_template, return_dict=False)
    return locked


class _WithHeads:
    @staticmethod
    def from_pretrained(name: str, **_: Any) -> Any:
        model: Any = LlamaForCausalLM.from_pretrained(name)
        for layer in model.model.layers:
            out = layer.self_attn.head_out = nn.Identity()
            layer.self_attn.o_proj.register_forward_pre_hook(
                lambda _, args, out=out: (out(args[0]),)
            )
        # It calls both; float16 is for accelerators.
        model.half = lambda: model
        model.cuda = lambda: model.to(_device())
        return model


class _Traced(dict[str, Any]):
    """Outputs of modules by name while a `with` block runs."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__({name: SimpleNamespace(output=None) for name in names})
        self._model = model

    def __enter__(self) -> _Traced:
        self._handles = [
            self._model.get_submodule(name).register_forward_hook(
                lambda _, __, output, kept=kept: setattr(kept, "output", output)
            )
            for name, kept in self.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def _rearrange(x: Any, pattern: str, h: int = 0) -> Any:
    x = np.asarray(x)
    return x.reshape(*x.shape[:-1], h, -1) if h else x.reshape(-1)


_EINOPS, _BAUKIT = ModuleType("einops"), ModuleType("baukit")
_EINOPS.rearrange = _rearrange  # type: ignore[attr-defined]
_BAUKIT.Trace, _BAUKIT.TraceDict = None, _Traced  # type: ignore[attr-defined]


def _labelled(row: TokenRow) -> tuple[torch.Tensor, torch.Tensor]:
    prompt, answer = row
    ids = torch.tensor([prompt + answer])
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    return ids, labels


def _preferences(rows: list[TokenRow]) -> list[dict[str, list[int]]]:
    found = []
    for pair in zip(rows[::2], rows[1::2], strict=True):
        features: dict[str, list[int]] = {}
        for side, (prompt, answer) in zip(("chosen", "rejected"), pair, strict=True):
            features[f"{side}_input_ids"] = prompt + answer
            features[f"{side}_attention_mask"] = [1] * len(prompt + answer)
            features[f"{side}_labels"] = [-100] * len(prompt) + answer
        found.append(features)
    return found


def _give_layers_their_positions(model: Any) -> None:
    """Decoder layers as they once were: they turn positions themselves, and return a tuple."""
    decoder = model.get_base_model().model

    def call(forward: Callable[..., Any], hidden: Any, position_ids: Any = None, **_: Any) -> Any:
        turned = decoder.rotary_emb(hidden, position_ids)
        return (forward(hidden, position_ids=position_ids, position_embeddings=turned),)

    for layer in decoder.layers:
        layer.forward = partial(call, layer.forward)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _quietly(step: Step) -> Step:
    """The step without its prints, and on the CPU where it asks for a device that isn't there."""
    move = torch.Tensor.to

    def to(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return move(x, *(_device() if str(a).startswith("cuda") else a for a in args), **kwargs)

    def quiet() -> None:
        with _silence(), patch.object(torch.Tensor, "to", to):
            step()

    return quiet


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    sink = io.StringIO()
    with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        yield
