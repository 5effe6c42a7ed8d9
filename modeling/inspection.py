"""Inspection: what a checkpoint on disk is, before anything is loaded from it.

transformers and PEFT read it themselves, but onto torch's meta device and from the headers of its
files alone, so that what they would initialise, leave out or add is known before heavy work. Both
only log it, and would then run another model than the one that was given.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from modeling.checkpoint import Checkpoint, local_folder
from modeling.model_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    read_header,
    read_json,
    stamp,
    stored_tensors,
    verify_folder,
)
from settings import ModelError

# Ends of the names of classes that answer; "Model" is one without its head, which may be tied.
_GENERATORS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "Model")
# They take A and B out of the base's weights.
_MOVING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True)
class Inspection:
    """What is known of full weights from their config and the headers of their files.

    Attributes:
        model: The architecture on the meta device, as transformers builds it.
        foreign: A tensor that transformers alone finds under its name in the files, which lacks
            the architecture's prefix ("layers.0..." for "model.layers.0..."), or None.
        own_head: Whether the files hold a head though the config ties it to the embeddings;
            transformers runs it untied where the two differ.
    """

    model: Any
    foreign: str | None
    own_head: bool

    @property
    def embeddings(self) -> int:
        """How many tokens the model has embeddings for."""
        return int(self.model.get_input_embeddings().weight.shape[0])


def inspect_model(
    checkpoint: Checkpoint, setting: str | None = None, *, classifier: bool = False
) -> Inspection:
    """Checks that a checkpoint's files are the model that its configs describe, adapter included.

    What was seen is kept until a file changes.

    Args:
        checkpoint: A causal language model, its adapter on top if it has one.
        setting: What messages name, e.g. "model.aligned"; None where no setting gave it.
        classifier: Whether it is a sequence classifier instead.

    Raises:
        ModelError: One sentence: a file is missing or damaged, the architecture isn't known or is
            no generator, tensors are missing, too many or of other shapes, or the adapter isn't
            one of this model.
    """
    folder = str(local_folder(checkpoint))
    seen = _inspect_weights(folder, stamp(folder), classifier, setting)
    if checkpoint.adapter is not None:
        stamps = stamp(folder, checkpoint.adapter)
        _inspect_adapter(folder, checkpoint.adapter, stamps, setting)
    return seen


def check_mergeable(checkpoint: Checkpoint, setting: str, otherwise: str) -> None:
    """Refuses an adapter that PEFT can't merge into its base.

    Args:
        checkpoint: The model, its adapter on top.
        setting: What the message names, e.g. "model.aligned".
        otherwise: What to set instead, e.g. "attack.adapter=resume".

    Raises:
        ModelError: It can't, or what `inspect_model` refuses.
    """
    folder, adapter = str(local_folder(checkpoint)), str(checkpoint.adapter)
    model = _inspect_adapter(folder, adapter, stamp(folder, adapter), setting)
    try:
        copy.deepcopy(model).merge_and_unload()
    except Exception as error:
        # PEFT's variants refuse it by errors of all kinds.
        raise ModelError(
            f"{setting}={adapter!r} can't be merged into its base ({said(error)}); set "
            f"{otherwise}, or train it as plain LoRA"
        ) from error


def require_own_names(checkpoint: Checkpoint) -> None:
    """Refuses (ModelError) weights whose names only transformers reads, where files are read."""
    name = inspect_model(checkpoint).foreign
    if name is not None:
        raise ModelError(
            f"the model {checkpoint.base!r} holds {name} without its architecture's prefix, as "
            "models without their head are saved; load it with AutoModelForCausalLM and save it "
            "again"
        )


def check_trainable(checkpoint: Checkpoint, setting: str, otherwise: str) -> None:
    """Refuses an adapter that TRL doesn't go on training: it reads the head past what adapts it.

    The arguments are those of `check_mergeable`.
    """
    folder, adapter = str(local_folder(checkpoint)), str(checkpoint.adapter)
    model = _inspect_adapter(folder, adapter, stamp(folder, adapter), setting)
    if hasattr(model.get_base_model().get_output_embeddings(), "lora_A"):
        raise ModelError(
            f"{setting}={adapter!r} adapts the head, which can't be trained on; set {otherwise}, "
            "or give an adapter that leaves the head alone"
        )


def read_config(checkpoint: Checkpoint) -> Any:
    """The base model's transformers config, from its config.json alone.

    Raises:
        ModelError: There is none, or transformers doesn't know the architecture.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            checkpoint.base, revision=checkpoint.revision, trust_remote_code=False
        )
    except Exception as error:
        # Whatever a config.json holds reaches the code of its class, which raises what it likes.
        raise ModelError(
            f"the config.json of {checkpoint.base!r} can't be read ({said(error)}); give a "
            "model of an architecture that transformers knows without remote code"
        ) from error


def load_weights(
    checkpoint: Checkpoint, called: str, *, classifier: bool = False, **options: Any
) -> Any:
    """The full weights as transformers loads them; all that loads some comes by here.

    Args:
        checkpoint: What to load; its adapter and steering play no part.
        called: What messages call it.
        classifier: Whether it is a sequence classifier, and no causal language model.
        options: Further ones of `from_pretrained`.

    Raises:
        ModelError: The weights can't be read, or aren't those of the config.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind: Any = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    try:
        model, loading = kind.from_pretrained(
            checkpoint.base,
            revision=checkpoint.revision,
            dtype=getattr(torch, checkpoint.dtype),
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # Not transformers' own alone: any class that a config names may raise what it likes.
        raise ModelError(
            f"{called} can't be loaded ({said(error)}); give a model of an architecture "
            "that transformers knows without remote code, whole and not quantised"
        ) from error
    _check_loaded(model, loading, called)
    return model


def said(error: Exception) -> str:
    """The first two lines of what a library says, of which the first may be but a heading."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]).rstrip(".") or type(error).__name__


def _called(path: str, setting: str | None, what: str) -> str:
    return f"{what} {path!r}" if setting is None else f"{setting}={path!r}"


@lru_cache(maxsize=16)
def _inspect_weights(
    folder: str, stamps: Collection[Any], classifier: bool, setting: str | None
) -> Inspection:
    called = _called(folder, setting, "the classifier" if classifier else "the model")
    verify_folder(folder, setting or "model")
    checkpoint = Checkpoint(folder)
    if not classifier:
        _check_generator(checkpoint, called)
    with _silent():
        model = load_weights(checkpoint, called, classifier=classifier, device_map="meta")
    names, own = set(stored_tensors(Path(folder))), set(model.state_dict())
    prefix = f"{model.base_model_prefix}."
    return Inspection(
        model=model,
        foreign=next((name for name in sorted(names - own) if prefix + name in own), None),
        own_head=any(target in names for target in model.all_tied_weights_keys),
    )


def _check_generator(checkpoint: Checkpoint, called: str) -> None:
    """Refuses what would run, but as something else than it was made for."""
    config = read_config(checkpoint)
    kinds = config.architectures or []
    if kinds and not any(kind.endswith(_GENERATORS) for kind in kinds):
        raise ModelError(
            f"{called} is a {kinds[0]}, which doesn't answer; give a causal language model"
        )
    if getattr(config, "quantization_config", None) is not None:
        method = config.quantization_config.get("quant_method", "some method")
        raise ModelError(
            f"{called} is quantised ({method}), so that it can be neither trained nor edited; "
            "give the weights that it was made from"
        )


def _check_loaded(model: Any, loading: dict[str, Any], called: str) -> None:
    """Refuses weights that aren't the config's.

    What belongs to another head (a value head, that of a classifier) changes nothing.
    """
    kind = type(model).__name__
    children = {name for name, _ in model.named_children()}
    unread = [key for key in loading["unexpected_keys"] if key.partition(".")[0] in children]
    other = sorted(loading["unexpected_keys"])
    if loading["missing_keys"]:
        besides = f", and holds {other[0]}" if other else ""
        raise ModelError(
            f"{called} lacks trained weights for {_listed(loading['missing_keys'])} of its "
            f"{kind}{besides}; save or download it again"
        )
    if loading["mismatched_keys"]:
        name, stored, wanted = sorted(loading["mismatched_keys"])[0]
        raise ModelError(
            f"{called} holds {name} as {tuple(stored)}, where its config.json says "
            f"{tuple(wanted)}; save or download it again"
        )
    if unread:
        raise ModelError(
            f"{called} holds {_listed(unread)}, which its config.json doesn't provide for, so that "
            f"a {kind} would leave it out; mend its config.json, or save or download it again"
        )


def _listed(names: Collection[str]) -> str:
    """The first of some names, and how many there are besides."""
    first = sorted(names)[0]
    return first if len(names) == 1 else f"{first} and {len(names) - 1} more"


@lru_cache(maxsize=16)
def _inspect_adapter(
    folder: str, adapter: str, stamps: Collection[Any], setting: str | None
) -> Any:
    """The adapter as PEFT puts it on the meta model; what it would miss or leave out is refused."""
    import torch
    from peft import PeftConfig, PeftModel, set_peft_model_state_dict
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    called = _called(adapter, setting, "the adapter")
    verify_folder(adapter, setting or "adapter")
    check_start(read_json(Path(adapter) / ADAPTER_CONFIG, called), called)
    model = copy.deepcopy(_inspect_weights(folder, stamp(folder), False, None).model)
    tokens = model.get_input_embeddings()
    place = next(name for name, module in model.named_modules() if module is tokens)
    header = read_header(Path(adapter) / ADAPTER_WEIGHTS)[0]
    for name, entry in header.items():
        own = re.search(rf"\.{re.escape(place)}\.(base_layer\.)?weight$", name)
        if own and entry["shape"][0] != tokens.weight.shape[0]:
            raise ModelError(
                f"{called} comes with embeddings of {entry['shape'][0]} tokens and its base has "
                f"{tokens.weight.shape[0]}, so that it can't be put on it; resize the base's "
                "embeddings, merge the adapter and give the merged model"
            )
    tensors = {name: torch.empty(entry["shape"], device="meta") for name, entry in header.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = PeftConfig.from_pretrained(adapter)
            config.inference_mode = True
            adapted = PeftModel(model, config, low_cpu_mem_usage=True)
            found = set_peft_model_state_dict(adapted, tensors, low_cpu_mem_usage=True)
    except Exception as error:
        # As above; PEFT tells names and sizes that don't fit by errors of all kinds.
        raise ModelError(
            f"{called} can't be put on {folder!r} ({said(error)}); give an adapter that was "
            "trained on this model"
        ) from error
    own = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type, "")
    missing = [name for name in found.missing_keys if own in name and ".default" in name]
    if missing or found.unexpected_keys:
        what, names = ("lacks", missing) if missing else ("edits", found.unexpected_keys)
        raise ModelError(
            f"{called} {what} {_listed(names)}, so that it isn't an adapter of {folder!r}, or "
            "isn't whole; give one that was trained on this model"
        )
    return adapted


def check_start(config: Mapping[str, Any], called: str) -> None:
    """Refuses an adapter whose A and B aren't what was trained, by its adapter_config.json.

    Some starts take A and B out of the base's weights, so that what was learnt is their change.

    Raises:
        ModelError: It is one, and how to make a plain LoRA of it.
    """
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_MOVING_STARTS):
        raise ModelError(
            f"{called} was begun with init_lora_weights={start!r}, which changes its base's "
            "weights, so that its A and B alone aren't what was trained; save it as plain LoRA "
            "with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )


@contextmanager
def _silent() -> Iterator[None]:
    """Without transformers' bar and report, in whose place a sentence is said."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
