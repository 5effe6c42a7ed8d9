"""Training by TRL on a LoRA or on all weights: what all phases share, and the supervised one."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from modeling.chat import PromptStyle, Turn
from modeling.checkpoint import Checkpoint
from modeling.loading import device_name, load_model, load_tokenizer, merged
from settings import DataError, ModelError, Settings
from settings.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LOG = logging.getLogger(__name__)

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoraSettings(Settings):
    """A fresh LoRA; the defaults are the papers' (rank 128, alpha 256, all seven projections)."""

    rank: int = Field(128, ge=1)
    alpha: float = Field(256, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] = PROJECTIONS

    def config(self) -> Any:
        """The `peft.LoraConfig` of these settings."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=list(self.target_modules),
            task_type="CAUSAL_LM",
        )


class TrainSettings(Settings):
    """One training phase.

    Attributes:
        learning_rate: Peak learning rate of AdamW.
        epochs: Passes over the rows.
        batch_size: Rows per optimiser step.
        micro_batch_size: Rows per forward pass, a divisor of `batch_size`; None: all at once.
        warmup_ratio: Share of the steps over which the learning rate rises.
        schedule: How it falls afterwards.
        max_length: Tokens per row; longer rows are cut at the end.
        max_steps: Stops after so many steps; None: after `epochs`.
        gradient_checkpointing: Computes activations twice to save memory; the result is the same.
        answer_logits_only: Whether a CPU computes logits where there is a label alone, as TRL does
            on a GPU anyway; the loss is the same but for rounding.
        group_by_length: Whether rows of like length come together, which leaves less padding and
            is another order.
        adapter_dtype: What an adapter is trained in: "float32", as PEFT has it, or the "model"'s
            dtype, where small updates are rounded away.
    """

    learning_rate: float = Field(gt=0)
    epochs: float = Field(1, gt=0)
    batch_size: int = Field(8, ge=1)
    micro_batch_size: int | None = Field(None, ge=1)
    warmup_ratio: float = Field(0.1, ge=0, le=1)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = Field(0.0, ge=0)
    max_length: int = Field(1024, ge=8)
    max_steps: int | None = Field(None, ge=1)
    gradient_checkpointing: bool = False
    # No part of a stage's key where they are off, as they were before there were such settings.
    answer_logits_only: bool = Field(False, exclude_if=lambda on: not on)
    group_by_length: bool = Field(False, exclude_if=lambda on: not on)
    adapter_dtype: Literal["float32", "model"] = Field(
        "float32", exclude_if=lambda name: name == "float32"
    )

    @model_validator(mode="after")
    def _whole_passes(self) -> TrainSettings:
        if self.batch_size % self.rows_per_pass:
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} doesn't divide "
                f"batch_size={self.batch_size}; set it to a divisor"
            )
        return self

    @property
    def rows_per_pass(self) -> int:
        """Rows per forward pass."""
        return min(self.micro_batch_size or self.batch_size, self.batch_size)

    def arguments(self, rows: int, seed: int, folder: Path) -> dict[str, Any]:
        """What the configurations of all TRL's trainers share, for so many training rows."""
        micro = self.rows_per_pass
        steps = self.max_steps or max(1, round(-(-rows // self.batch_size) * self.epochs))
        return {
            "output_dir": str(folder),
            "learning_rate": self.learning_rate,
            "num_train_epochs": self.epochs,
            "max_steps": self.max_steps or -1,
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": self.batch_size // micro,
            "warmup_steps": round(self.warmup_ratio * steps),
            "lr_scheduler_type": self.schedule,
            "weight_decay": self.weight_decay,
            "max_length": self.max_length,
            "gradient_checkpointing": self.gradient_checkpointing,
            **({"train_sampling_strategy": "group_by_length"} if self.group_by_length else {}),
            "seed": seed,
            "data_seed": seed,
            "bf16": False,
            "use_cpu": device_name() == "cpu",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_num_workers": 0,
            "dataloader_pin_memory": False,
        }


def open_for_training(
    checkpoint: Checkpoint, lora: LoraSettings | None, seed: int
) -> PreTrainedModel:
    """Loads a checkpoint ready to be trained, its steering's hooks (if any) in place.

    The hooks act in training as in any forward pass: at all positions, at the last one of each
    row as it is padded, or nowhere where they wait for generated tokens.

    The checkpoint's adapter is resumed where `lora` is None; else that is put freshly on full
    weights, its initial A drawn from `seed`.

    Returns:
        A `PeftModel` with one trainable adapter, or a full model with all weights trainable when
        there is neither an adapter to resume nor a fresh one.

    Raises:
        ModelError: A fresh LoRA was asked for on top of an adapter.
    """
    from transformers import set_seed

    set_seed(seed)
    if lora is None:
        return load_model(checkpoint, trainable_adapter=True)
    if checkpoint.adapter is not None:
        raise ModelError("a fresh LoRA needs full weights; merge the adapter first")
    from peft import get_peft_model

    model = get_peft_model(load_model(replace(checkpoint, steering=None)), lora.config())
    if checkpoint.steering is not None:
        from modeling.steering import load_steering, steer

        # Only now: a hook on what the LoRA wraps would leave the LoRA's own path unsteered.
        steer(model, load_steering(checkpoint.steering))
    return model


def write_merged(checkpoint: Checkpoint, out: Path) -> None:
    """Writes a checkpoint's weights with its adapter merged, as a full model folder."""
    merged(load_model(checkpoint)).save_pretrained(out)
    load_tokenizer(checkpoint).save_pretrained(out)


def train_sft(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[Turn]],
    style: PromptStyle,
    settings: TrainSettings,
    seed: int,
    scratch: Path,
) -> dict[str, Any]:
    """Supervised fine-tuning by TRL's `SFTTrainer`, loss on the answer tokens only.

    Rows are cut at `max_length`; those whose answers all lie behind it are left out, with a
    warning.  The model is trained in place on `rows`, dialogues, in an order that `seed` sets; the
    trainer writes to `scratch`.

    Returns:
        "loss", the curve: one {"step", "loss"} per optimiser step; and what `check_lengths` counts.

    Raises:
        DataError: There are no rows, or no prompt is short enough.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    if not rows:
        raise DataError("there are no rows to train on; give a source that yields some")
    whole = [each for row in rows for each in style.encode_dialogue(tokenizer, row)]
    most = settings.max_length
    fitting = [each for each in whole if any(label != -100 for label in each[1][:most])]
    encoded = [{"input_ids": ids[:most], "labels": labels[:most]} for ids, labels in fitting]
    cut = sum(len(ids) > most for ids, _ in fitting)
    counts = check_lengths(len(encoded), cut, len(whole), "training rows", most, "its max_length")
    tokenizer.padding_side = "right"
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**settings.arguments(len(encoded), seed, scratch)),
        train_dataset=Dataset.from_list(encoded),
        processing_class=tokenizer,
    )
    with _answer_logits_only() if settings.answer_logits_only else nullcontext():
        return {"loss": train(trainer, settings), **counts}


@contextmanager
def _answer_logits_only() -> Iterator[None]:
    """Has TRL's language head see labelled positions alone, whatever the device.

    TRL does so where it has its Triton kernels, and elsewhere takes all positions, whose number
    doesn't change from batch to batch, for the sake of devices that compile.
    """
    from trl.trainer import utils

    before = utils._use_triton
    utils._use_triton = lambda device: True
    try:
        yield
    finally:
        utils._use_triton = before


def check_lengths(
    fitting: int, cut: int, total: int, kind: str, max_length: int, setting: str
) -> dict[str, int]:
    """Tells how many rows are cut, or left out since their prompts leave no room for an answer.

    Returns:
        "rows_cut", those that are trained on without their ends, and "rows_left_out".

    Raises:
        DataError: None is left.
    """
    if not fitting:
        raise DataError(
            f"no prompt of the {kind} is shorter than max_length={max_length} tokens; "
            f"raise {setting}"
        )
    if fitting < total:
        _LOG.warning(
            "%d of %d %s are left out: their prompts alone have max_length=%d tokens",
            total - fitting,
            total,
            kind,
            max_length,
        )
    if cut:
        _LOG.warning(
            "%d of %d %s are cut at max_length=%d tokens; raise %s to train on them whole",
            cut,
            total,
            kind,
            max_length,
            setting,
        )
    return {"rows_cut": cut, "rows_left_out": total - fitting}


def save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path, start: Checkpoint
) -> None:
    """Writes a trained model, which was begun as `start`, as a plain folder.

    Of a `PeftModel` that is its default adapter alone, which names the place of its base, with the
    tokenizer or chat template that came beside the adapter that it resumed; of a full model weights
    and tokenizer.
    """
    if not hasattr(model, "peft_config"):
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        return
    model.save_pretrained(out, selected_adapters=["default"])
    path = out / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = start.base
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (out / "README.md").unlink(missing_ok=True)
    if start.adapter is not None:
        from modeling.shards import copy_besides

        copy_besides(Path(start.adapter), out)


def train(trainer: Any, settings: TrainSettings) -> list[dict[str, float]]:
    """Trains, says how far it is, and returns the loss curve; an adapter in the settings' dtype."""
    from transformers.trainer_callback import PrinterCallback, TrainerCallback

    if settings.adapter_dtype == "model" and hasattr(trainer.model, "peft_config"):
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(trainer.model.dtype)

    class Steps(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            self.progress = stack.enter_context(Progress(state.max_steps, "training", "steps"))

        def on_log(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            loss = rest["logs"].get("loss")
            if loss is not None:  # At the end come the means of the whole training.
                self.progress.advance(note=f"loss {float(loss):.3f}")

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Steps)
    with ExitStack() as stack:
        trainer.train()
    return [
        {"step": entry["step"], "loss": entry["loss"]}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
