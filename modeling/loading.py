"""Models and tokenizers in memory, loaded from checkpoints; all that runs a model comes by here."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modeling.checkpoint import Checkpoint, local_folder
from modeling.inspection import inspect_model, load_weights, said
from modeling.model_files import read_json
from settings import ModelError
from settings.memory import streaming
from settings.process import collect_as_usual

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TEMPLATE, _TOKENIZER = "chat_template.jinja", "tokenizer_config.json"
# What a tokenizer can be read from, besides its config.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


def device_name() -> str:
    """The device that models run on: the first CUDA device where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The model's tokenizer, left-padded, with a padding token.

    It is the one beside the adapter where that comes with one, since that is what the adapter was
    trained with; else the one beside the base weights, with the adapter's own chat template if
    there is such a file.

    Raises:
        ModelError: There is none, or it can't be read.
    """
    from transformers import AutoTokenizer

    adapter, place, revision = checkpoint.adapter, checkpoint.base, checkpoint.revision
    if _brings_tokenizer(adapter):
        place, revision = str(adapter), None
    try:
        # Where mistral_common is installed, as vLLM installs it, a Mistral's tekken.json would be
        # read in place of its tokenizer.json, and with it no chat template.
        tokenizer = AutoTokenizer.from_pretrained(
            place, revision=revision, mistral_format=False, trust_remote_code=False
        )
    except Exception as error:
        # A damaged file reaches code that raises what it likes.
        raise ModelError(
            f"the tokenizer of {place!r} can't be read ({said(error)}); save the model's tokenizer "
            "beside its weights"
        ) from error
    if adapter is not None and (own := _template_in(Path(adapter))):
        tokenizer.chat_template = own
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _brings_tokenizer(adapter: str | None) -> bool:
    return adapter is not None and any((Path(adapter) / name).is_file() for name in _VOCABULARIES)


def chat_template(checkpoint: Checkpoint) -> str:
    """The text of a model's chat template, by its files alone; "" where it has none."""
    folders = [checkpoint.adapter, str(local_folder(checkpoint))]
    found = (_template_in(Path(folder)) for folder in folders if folder is not None)
    return next(filter(None, found), "")


def _template_in(folder: Path) -> str:
    if (folder / _TEMPLATE).is_file():
        return (folder / _TEMPLATE).read_text(encoding="utf-8")
    if not (folder / _TOKENIZER).is_file():
        return ""
    template = read_json(folder / _TOKENIZER, "the tokenizer").get("chat_template") or ""
    if isinstance(template, list):  # Several, by name.
        template = next((each["template"] for each in template if each["name"] == "default"), "")
    return str(template)


def check_tokenizer(checkpoint: Checkpoint, setting: str) -> None:
    """Refuses a tokenizer whose ids the model has no embeddings for.

    Raises:
        ModelError: It is such a one, or there is none.
    """
    try:
        tokens = 1 + max(load_tokenizer(checkpoint).get_vocab().values())
    except ModelError as error:
        raise ModelError(f"{setting}: {error}") from error
    embeddings = inspect_model(checkpoint, setting).embeddings
    if tokens > embeddings:
        raise ModelError(
            f"{setting}={(checkpoint.adapter or checkpoint.base)!r} has a tokenizer of {tokens} "
            f"tokens, and the model has embeddings for {embeddings}; give the tokenizer that it "
            "was trained with, or resize its embeddings and save it again"
        )


def load_model(
    checkpoint: Checkpoint, *, trainable_adapter: bool = False, device: str | None = None
) -> PreTrainedModel:
    """Loads the weights, the adapter on top (a `PeftModel` then), and the steering's hooks.

    Args:
        checkpoint: What to load.
        trainable_adapter: Whether the adapter's parameters require gradients.
        device: Where to put it; `device_name()` by default.

    Raises:
        ModelError: The weights or the steering can't be read, or don't fit each other.
    """
    inspect_model(checkpoint)
    _freeze_imports()
    model = load_weights(checkpoint, f"the model {checkpoint.base!r}")
    if checkpoint.adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, checkpoint.adapter, is_trainable=trainable_adapter)
    model = model.to(device or device_name())
    if checkpoint.steering is not None:
        from modeling.steering import load_steering, steer

        steer(model, load_steering(checkpoint.steering))
    return model


@cache
def _freeze_imports() -> None:
    """Leaves what imports made out of the collection after each model.

    It is done before the first model is loaded: what is frozen is never collected.
    """
    import peft  # noqa: F401 - the last of the large ones, which most runs need.

    collect_as_usual()


def load_decoder(checkpoint: Checkpoint) -> Any:
    """The model for forward passes alone: streamed where runtime.stream_weights says so.

    Where that says nothing, a model is streamed that doesn't fit into the memory that is free.

    Raises:
        ModelError: What `load_model` refuses, or it can't be streamed.
    """
    from modeling.streaming import load_streamed, weight_bytes

    streamed = streaming()
    if streamed is None:
        streamed = weight_bytes(checkpoint) > _free_bytes()
    if not streamed:
        return load_model(checkpoint).eval()
    _freeze_imports()
    return load_streamed(checkpoint, device_name())


def _free_bytes() -> int:
    """Memory that a model may take: of the first CUDA device, or what the system has left."""
    import psutil  # type: ignore[import-untyped]
    import torch

    if device_name() == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)


def merged(model: Any) -> PreTrainedModel:
    """A loaded adapter's model with the adapter merged into it; full weights as they are.

    A head that is tied to the embeddings is untied before, since merging one would change both.

    Raises:
        ModelError: PEFT can't merge an adapter of this kind.
    """
    import torch

    if not hasattr(model, "peft_config"):
        return model
    inner = model.get_base_model()
    embeddings, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    wrapped = any(hasattr(each, "base_layer") for each in (embeddings, head))
    head = getattr(head, "base_layer", head)
    if wrapped and head.weight is getattr(embeddings, "base_layer", embeddings).weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    try:
        result = model.merge_and_unload()
    except Exception as error:
        # PEFT's variants refuse it by errors of all kinds.
        raise ModelError(
            f"the adapter can't be merged into its base ({said(error)}); set "
            "attack.adapter=resume, or train it as plain LoRA"
        ) from error
    head, embeddings = result.get_output_embeddings(), result.get_input_embeddings()
    if result.config.tie_word_embeddings and head.weight is not embeddings.weight:
        result.config.tie_word_embeddings = False
        result.all_tied_weights_keys = {}
    return result


def copy_tokenizer(checkpoint: Checkpoint, out: Path) -> None:
    """Writes a model's tokenizer, chat template and generation settings beside its new weights."""
    from modeling.shards import copy_besides

    copy_besides(local_folder(checkpoint), out)
    adapter = checkpoint.adapter
    if adapter is not None and (_brings_tokenizer(adapter) or _template_in(Path(adapter))):
        load_tokenizer(checkpoint).save_pretrained(out)
