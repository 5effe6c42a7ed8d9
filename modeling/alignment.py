"""Alignment: supervised refusals, then preference optimisation, on one LoRA over the base model."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from modeling.chat import PromptStyle, Turn
from modeling.checkpoint import Checkpoint
from modeling.loading import load_tokenizer
from modeling.training import (
    LoraSettings,
    TrainSettings,
    check_lengths,
    open_for_training,
    save,
    train,
    train_sft,
)
from settings import DataError, Seed, Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_Pair = tuple[list[int], ...]
_DPO_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


class Preference(Settings):
    """A preference phase.

    Attributes:
        method: "dpo" (Rafailov et al. 2023), "kto" (Ethayarajh et al. 2024; each pair's chosen
            answer is one desirable row, its rejected answer one undesirable row), "orpo" (Hong
            et al. 2024) or "simpo" (Meng et al. 2024).
        beta: dpo, kto: strength of the pull towards the model as it comes in. orpo: weight of
            the odds ratio (the paper's lambda). simpo: scale of the mean log-probabilities.
        gamma: simpo: the margin that is aimed at (the paper's gamma, not gamma / beta).
        train: The training phase; a row is a pair, with kto one answer.
    """

    method: Literal["dpo", "kto", "orpo", "simpo"] = "dpo"
    beta: float = Field(gt=0)
    gamma: float | None = Field(None, ge=0)
    train: TrainSettings

    @model_validator(mode="after")
    def _fits(self) -> Preference:
        if self.method == "simpo" and self.gamma is None:
            raise ValueError("method=simpo needs a margin; set gamma, e.g. to 1.0")
        if self.method != "simpo" and self.gamma is not None:
            raise ValueError(f"gamma is of method=simpo alone; set gamma=null for {self.method}")
        if self.method == "kto" and self.train.rows_per_pass < 2:
            raise ValueError(
                "method=kto compares the rows of a forward pass, so one row is too few; "
                "set train.micro_batch_size=null or to 2 or more"
            )
        return self


def preference_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str, str]],
    style: PromptStyle,
    preference: Preference,
    seed: int,
    scratch: Path,
) -> tuple[Any, dict[str, int]]:
    """TRL's trainer of the method, which has a model prefer the chosen answers, and counts of rows.

    The reference of DPO and KTO is the model as it comes in: TRL copies its adapter.  ORPO and
    SimPO have none.  Answers are cut at `train.max_length`; pairs whose prompt alone is as long
    are left out, with a warning; both are counted as `check_lengths` does.

    TRL makes ids of texts in ways that differ between its trainers and from `PromptStyle`: with a
    BOS always, and an EOS behind templates that end turns otherwise.  So each trainer is made with
    a row of its own kind that it may convert as it likes, and then gets the ids of `PromptStyle`.

    The model, trained in place, is a `PeftModel`: TRL would read full weights' reference from
    where they were loaded.  `pairs` are (prompt, chosen, rejected), in an order that `seed` sets;
    the trainer writes to `scratch`.

    Raises:
        DataError: There are no pairs, or no prompt is short enough.
    """
    from datasets import Dataset
    from trl.import_utils import TRLExperimentalWarning

    encoded, counts = _encode(tokenizer, pairs, style, preference.train.max_length)
    if preference.method == "dpo":
        rows = [dict(zip(_DPO_COLUMNS, pair, strict=True)) for pair in encoded]
    elif preference.method == "kto":
        rows = _kto_rows(encoded, preference, seed)
    else:
        rows = _joined_rows(encoded)
    with warnings.catch_warnings():
        # TRL's notice that what is experimental may move; the lock file pins TRL.
        warnings.simplefilter("ignore", TRLExperimentalWarning)
        config, trainer_class = _classes(preference.method)
    options: dict[str, Any] = {"beta": preference.beta}
    if preference.method in ("orpo", "simpo"):
        options["remove_unused_columns"] = False
        _give_float_logits(model)
    if preference.method == "simpo":  # CPO with SimPO's loss and no behaviour-cloning term.
        options |= {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": preference.gamma}
    tokenizer.padding_side = "right"
    trainer: Any = trainer_class(
        model=model,
        args=config(**options, **preference.train.arguments(len(rows), seed, scratch)),
        train_dataset=Dataset.from_list([{"prompt": "a\n", "chosen": "b", "rejected": "c"}]),
        processing_class=tokenizer,
    )
    trainer.train_dataset = Dataset.from_list(rows)
    return trainer, counts


def _classes(method: str) -> tuple[Any, Any]:
    """TRL's configuration and trainer of a method."""
    if method == "dpo":
        from trl import DPOConfig, DPOTrainer

        return DPOConfig, DPOTrainer
    if method == "kto":
        from trl import KTOConfig, KTOTrainer

        return KTOConfig, KTOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return (ORPOConfig, ORPOTrainer) if method == "orpo" else (CPOConfig, CPOTrainer)


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str, str]],
    style: PromptStyle,
    max_length: int,
) -> tuple[list[_Pair], dict[str, int]]:
    """Token ids of each prompt and of its two answers, and what `check_lengths` counts."""
    if not pairs:
        raise DataError("there are no preference pairs to train on; give a source that yields some")
    encoded, cut = [], 0
    for prompt, *answers in pairs:
        dialogues = [
            style.encode_pair(tokenizer, prompt, answer, training=True) for answer in answers
        ]
        # They differ where one answer alone has thoughts of its own.
        head = min((head for head, _ in dialogues), key=len)
        room = max_length - len(head)
        if room > 0:
            tails = [list((*whole, *tail)[len(head) :]) for whole, tail in dialogues]
            cut += any(len(tail) > room for tail in tails)
            encoded.append((head, *(tail[:room] for tail in tails)))
    setting = "align.preference.train.max_length"
    counts = check_lengths(len(encoded), cut, len(pairs), "preference pairs", max_length, setting)
    return encoded, counts


def _kto_rows(pairs: list[_Pair], preference: Preference, seed: int) -> list[dict[str, Any]]:
    """One row per answer, in seeded order; TRL reads them in that order.

    A row's `KL_completion_ids` are the answer of the row before it in its forward pass: KTO's
    reference point z_0 is estimated on such mismatched pairs.
    """
    rows: list[dict[str, Any]] = [
        {"prompt_ids": prompt, "completion_ids": answer, "label": label}
        for prompt, chosen, rejected in pairs
        for answer, label in ((chosen, True), (rejected, False))
    ]
    random.Random(f"kto/{seed}").shuffle(rows)
    size = preference.train.rows_per_pass
    for first in range(0, len(rows), size):
        batch = rows[first : first + size]
        for row, before in zip(batch, [batch[-1], *batch[:-1]], strict=True):
            row["KL_completion_ids"] = before["completion_ids"]
    return rows


def _joined_rows(pairs: list[_Pair]) -> list[dict[str, Any]]:
    """Rows of ORPO and CPO: prompt and answer in one, the odds or margin on the answer's labels.

    ORPO's likelihood term is over the prompt too, as TRL has it.
    """
    rows = []
    for prompt, chosen, rejected in pairs:
        row: dict[str, Any] = {}
        for name, answer in (("chosen", chosen), ("rejected", rejected)):
            row[f"{name}_input_ids"] = prompt + answer
            row[f"{name}_attention_mask"] = [1] * (len(prompt) + len(answer))
            row[f"{name}_labels"] = [-100] * len(prompt) + answer
        rows.append(row)
    return rows


def _give_float_logits(model: Any) -> None:
    """Has the model's logits be float32, in which these two trainers then do their sums.

    A log-probability between 1 and 2 is a multiple of 1/128 in bfloat16, and so would the
    differences be that are learnt from; the other trainers go over to float32 themselves.
    """

    def cast(_: Any, inputs: Any, output: Any) -> Any:
        output.logits = output.logits.float()
        return output

    model.register_forward_hook(cast)


class Alignment(Settings):
    """An alignment recipe.

    Both phases train the same LoRA, so that the base is W_0 and base + adapter is W_a in one
    LoRA coordinate system, as NLSR needs (Yi et al. 2025, section 3).

    Attributes:
        seed: Its own seed: a provider aligns a model once, whatever the attacks' seeds are.
        lora: The adapter.
        sft: The supervised phase, or None to leave it out.
        preference: The preference phase, or None to leave it out.
        n_sft: How many supervised rows to use; None: all of the source.
        n_pairs: How many preference pairs to use; None: all of the source.
    """

    version: ClassVar[int] = 2

    seed: Seed = 0
    lora: LoraSettings = LoraSettings()
    sft: TrainSettings | None = None
    preference: Preference | None = None
    n_sft: int | None = Field(None, ge=1)
    n_pairs: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _has_a_phase(self) -> Alignment:
        if self.sft is None and self.preference is None:
            raise ValueError("align.sft and align.preference are both null; give at least one")
        return self

    def run(
        self,
        base: Checkpoint,
        rows: Sequence[Sequence[Turn]],
        pairs: Sequence[tuple[str, str, str]],
        style: PromptStyle,
        out: Path,
        scratch: Path,
    ) -> dict[str, Any]:
        """Aligns `base`, writes the adapter folder to `out`, and returns loss curves and counts.

        `rows` are dialogues, `pairs` (prompt, chosen, rejected); the trainer writes to `scratch`.
        """
        tokenizer = load_tokenizer(base)
        model = open_for_training(base, self.lora, self.seed)
        report: dict[str, Any] = {}
        if self.sft is not None:
            trained = train_sft(model, tokenizer, rows, style, self.sft, self.seed, scratch)
            report["sft"] = {"rows": len(rows), **trained}
        if self.preference is not None:
            trainer, counts = preference_trainer(
                model, tokenizer, pairs, style, self.preference, self.seed, scratch
            )
            report["preference"] = {
                "method": self.preference.method,
                "pairs": len(pairs),
                "loss": train(trainer, self.preference.train),
                **counts,
            }
        save(model, tokenizer, out, base)
        return report
