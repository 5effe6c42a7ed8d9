"""What each stage costs: rows, tokens, disk, GPU memory and seconds, from what it would be given.

Each method of `Costs` bears a stage's name and takes what `pipeline.steps` hands that
stage's function.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attacks.base import Attack, AttackData
from data.rows import Example, PreferencePair, Prompt
from defenses.base import Answered, Defense, Models, Pass
from evaluation.base import Backend, Judge
from experiments.pipeline.calibration import StoredCalibration
from experiments.pipeline.inputs import PromptSet
from experiments.plan import memory
from experiments.plan.effort import FORWARD, Rates, training_passes
from experiments.plan.forms import Forms, left
from experiments.plan.lengths import Lengths
from experiments.plan.memory import Loaded
from experiments.plan.models import Unseen, runs_here
from modeling.alignment import Alignment
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint
from modeling.preference import Preference
from modeling.training import TrainSettings

# A row of answers or verdicts in Parquet besides its texts: id, category, numbers, page headers.
BYTES_PER_ROW = 64
# A token id in a JSON list: up to six digits, a comma and a space.
BYTES_PER_TOKEN_ID = 8
# English text, as in `tokens`.
BYTES_PER_TOKEN = 4
# What a judge that is a causal model is asked besides the prompt and the answer: the published
# instructions take some 150 to 1,000 tokens, and can't be counted before they are fetched.
JUDGE_QUESTION_TOKENS = 500
# A LoRA whose change was edited needs the factors of before and after the attack.
EDITED_RANKS = 2
# Forward passes without gradients: DPO's reference; KTO's, and both models on mismatched answers.
_REFERENCES = {"dpo": 1, "kto": 3}


@dataclass(frozen=True)
class Cost:
    """What one stage takes.

    Attributes:
        rows: Rows that it trains on, answers, judges, scores, or runs through a model.
        prompt_tokens: Tokens that go in, of each row once an epoch.
        answer_tokens: Tokens that are generated, at most.
        disk: Bytes in the store.
        memory: Bytes of GPU memory at its peak.
        seconds: How long it takes.
    """

    rows: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    disk: int = 0
    memory: int = 0
    seconds: float = 0.0


class Costs:
    """The costs of stages; what they share is counted once.

    Attributes:
        forms: What checkpoints look like.
        rates: What the machine sustains.
        lengths: Of the rows.
        calibrations: {artefact: what is read for it}.
    """

    def __init__(self, forms: Forms, rates: Rates) -> None:
        self.forms = forms
        self.rates = rates
        self.lengths = Lengths(forms)
        self.calibrations: dict[Path, StoredCalibration] = {}
        self._opened: set[Checkpoint] = set()
        self._asked: dict[Path, tuple[list[int], int]] = {}

    def align(
        self,
        recipe: Alignment,
        base: Checkpoint,
        rows: Sequence[Example],
        pairs: Sequence[PreferencePair],
        style: PromptStyle,
    ) -> Cost:
        """Both phases on one LoRA; the hungrier one gives the memory."""
        model = self.forms.loaded(base, recipe.lora)
        total = Cost(disk=model.adapter_bytes, seconds=self._moving(base))
        if recipe.sft is not None:
            texts = [(row.prompt, row.response) for row in rows]
            total = _sum(total, self._training(model, base, texts, style, recipe.sft, None))
        if recipe.preference is not None:
            both = [(p.prompt, answer) for p in pairs for answer in (p.chosen, p.rejected)]
            settings = recipe.preference.train
            trained = self._training(model, base, both, style, settings, recipe.preference)
            total = _sum(total, trained)
        return total

    def merge(self, model: Checkpoint) -> Cost:
        """Loaded, merged, written."""
        loaded = self.forms.loaded(model)
        size = loaded.bytes - loaded.adapter_bytes
        seconds = self._moving(model) + self.rates.moving(size)
        return Cost(disk=size, memory=loaded.bytes, seconds=seconds)

    def attack(
        self, method: Attack, aligned: Checkpoint, data: AttackData, style: PromptStyle, seed: int
    ) -> Cost:
        """The rows that the attack draws; nothing where it can't say which."""
        settings = getattr(method, "train", None)
        if not isinstance(settings, TrainSettings) or not hasattr(method, "rows"):
            return Cost()
        rows = [(row.prompt, row.response) for row in method.rows(data, seed)]
        adapter = getattr(method, "adapter", "resume")
        model = self.forms.loaded(aligned, method.lora if adapter == "fresh" else None)  # type: ignore[attr-defined]
        if method.system is not None:
            style = style.model_copy(update={"system": method.system})
        written = model.adapter_bytes or model.bytes
        cost = self._training(model, aligned, rows, style, settings, None)
        seconds = self._moving(aligned) + self.rates.moving(written)
        return _sum(Cost(disk=written, seconds=seconds), cost)

    def prepare(self, defense: Defense, models: Models, calibration: StoredCalibration) -> Cost:
        """What runs through the aligned model, the verdicts in between, and the artefact.

        The answers that are generated for it are stages of their own.
        """
        cost = self._read(defense.prepare_passes, models.aligned, calibration)
        for each in defense.answered:
            if each.judged:
                prompts = self.asked(each, calibration)
                lengths = self.lengths.prompts(models.aligned, calibration.style, prompts)
                judged = self._judged(calibration.judge, lengths, calibration.max_new_tokens)
                cost = _sum(cost, Cost(memory=judged.memory, seconds=judged.seconds))
        disk = cost.prompt_tokens * BYTES_PER_TOKEN_ID
        if defense.keeps_adapter:
            model = self.forms.loaded(models.aligned)
            masks = model.lora.parameters // 8 if model.lora else 0
            disk = model.adapter_bytes + masks
        return _sum(cost, Cost(disk=disk, seconds=self.rates.moving(disk)))

    def apply(self, defense: Defense, artefact: Path, attacked: Checkpoint, models: Models) -> Cost:
        """What runs through the attacked model, and what is written of it and of each step."""
        cost = self._read(defense.apply_passes, attacked, self.calibrations[artefact])
        model = attacked
        for part in getattr(defense, "parts", (defense,)):
            steps = 1 if part is not defense else max(1, len(part.step_names))
            after = left(part, model, Path(attacked.adapter or attacked.base) / "left")
            disk = steps * self._written(part, model, after)
            read = 0 if part.passes_on else self.forms.loaded(model).bytes
            seconds = self.rates.moving(read + disk)
            needed = 0 if part.passes_on else memory.streaming(self.forms.loaded(model))
            cost = _sum(cost, Cost(disk=disk, memory=needed, seconds=seconds))
            self.forms.keep(model, after)
            model = after
        return cost

    def generate(
        self,
        backend: Backend,
        model: Checkpoint,
        style: PromptStyle,
        prompts: PromptSet,
        undefended: Checkpoint | None,
        out: Path,
    ) -> Cost:
        """Greedy answers at full length; a model is loaded once for all its sets."""
        texts = [prompt.text for prompt in prompts.prompts]
        starts = None
        if prompts.asked is not None:
            texts = [entry.text for entry in prompts.asked]
            starts = [entry.start for entry in prompts.asked]
        lengths = self.lengths.prompts(model, style, texts, prompts.system, starts)
        self._asked[out] = lengths, prompts.max_new_tokens
        loaded, batch = self.forms.loaded(model), backend.rows_at_once
        answer = prompts.max_new_tokens
        seconds = self.rates.decoding(loaded, lengths, answer, batch)
        if model not in self._opened:
            self._opened.add(model)
            seconds += self._moving(model)
        rows, longest = len(lengths), max(lengths, default=0)
        return Cost(
            rows=rows,
            prompt_tokens=sum(lengths),
            answer_tokens=rows * answer,
            disk=_parquet(rows, 2 * sum(lengths) + rows * answer),
            memory=memory.generation(loaded, min(batch, rows), longest, answer),
            seconds=seconds,
        )

    def likelihood(
        self,
        backend: Backend,
        model: Checkpoint,
        style: PromptStyle,
        texts: Sequence[Example],
        max_tokens: int,
        undefended: Checkpoint | None,
    ) -> Cost:
        """A pass over the held-out texts, with logits at every place of one text at a time."""
        rows = [(text.prompt, text.response) for text in texts]
        whole = self.lengths.answered(model, style, rows)
        lengths = [min(max_tokens, length) for length in whole]
        loaded, longest = self.forms.loaded(model), max(lengths, default=0)
        return Cost(
            rows=len(rows),
            prompt_tokens=sum(lengths),
            disk=_parquet(len(rows), sum(lengths)),
            memory=loaded.bytes + memory.forward(loaded, longest, longest),
            seconds=self.rates.passes(loaded, lengths, 1, FORWARD),
        )

    def judge(self, method: Judge, answers: Path) -> Cost:
        """A pass of the judge's own model, where it has one, over prompts and answers."""
        lengths, answer = self._asked[answers]
        cost = self._judged(method, lengths, answer)
        return _sum(cost, Cost(disk=_parquet(len(lengths), 0)))

    def score(self, task: Any, items: Any, answers: Path) -> Cost:
        """Reading of answers: no model."""
        lengths, _ = self._asked[answers]
        return Cost(rows=len(lengths), disk=_parquet(len(lengths), 0))

    def asked(self, answered: Answered, calibration: StoredCalibration) -> list[str]:
        """The texts of the prompts that a model answers for `prepare`."""
        prompts: list[Prompt] = [
            prompt for name in answered.prompts for prompt in getattr(calibration, name)
        ]
        return [prompt.text for prompt in prompts[: answered.at_most]]

    def _training(
        self,
        model: Loaded,
        checkpoint: Checkpoint,
        rows: Sequence[tuple[str, str]],
        style: PromptStyle,
        settings: TrainSettings,
        preference: Preference | None,
    ) -> Cost:
        """One phase; `rows` are (prompt, answer), for a preference phase two of each pair."""
        method = preference.method if preference else "sft"
        answers = 2 if method in ("dpo", "orpo", "simpo") else 1
        whole = self.lengths.answered(checkpoint, style, rows, training=True)
        lengths = [min(settings.max_length, length) for length in whole]
        if not lengths:
            return Cost()
        epochs = settings.epochs
        if settings.max_steps is not None:
            epochs = settings.max_steps * settings.batch_size * answers / len(lengths)
        batch = min(settings.rows_per_pass * answers, len(lengths))
        passes = training_passes(
            lora=model.lora is not None,
            checkpointing=settings.gradient_checkpointing,
            references=_REFERENCES.get(method, 0),
        )
        longest = max(lengths)
        return Cost(
            rows=len(rows) // (2 if preference else 1),
            prompt_tokens=round(sum(lengths) * epochs),
            memory=memory.training(
                model,
                batch * longest,
                longest,
                checkpointing=settings.gradient_checkpointing,
                reference=method in _REFERENCES,
                fused=method in ("sft", "dpo", "kto"),
            ),
            seconds=self.rates.passes(model, lengths, batch, passes) * epochs,
        )

    def _read(
        self, passes: Sequence[Pass], checkpoint: Checkpoint, calibration: StoredCalibration
    ) -> Cost:
        """Calibration rows that run through a model."""
        model, total = self.forms.loaded(checkpoint), Cost()
        for each in passes:
            lengths = self._read_lengths(each, checkpoint, calibration)
            count = each.batch_size * max(lengths, default=0)
            needed = model.bytes + memory.forward(model, count, each.batch_size)
            kind = FORWARD
            if each.gradients:
                kept = model.shape.layers * memory.activations(model, count, max(lengths))
                needed = model.bytes + model.adapter_bytes + kept
                needed += memory.head(model, count, fused=False)
                kind = training_passes(lora=True, checkpointing=False, references=0)
            seconds = each.times * self.rates.passes(model, lengths, each.batch_size, kind)
            tokens = each.times * sum(lengths)
            total = _sum(total, Cost(len(lengths), tokens, memory=needed, seconds=seconds))
        if passes:
            total = _sum(total, Cost(seconds=self._moving(checkpoint)))
        return total

    def _read_lengths(
        self, read: Pass, checkpoint: Checkpoint, calibration: StoredCalibration
    ) -> list[int]:
        style, lengths = calibration.style, []
        for name in read.rows:
            rows = list(getattr(calibration, name))[: read.at_most]
            if name == "safety_pairs":
                kinds = ("chosen", "rejected") if read.answers == "both" else ("rejected",)
                pairs = [(row.prompt, getattr(row, kind)) for row in rows for kind in kinds]
                lengths += self.lengths.answered(checkpoint, style, pairs)
                continue
            answer = calibration.max_new_tokens if read.answers == "generated" else 0
            prompts = self.lengths.prompts(checkpoint, style, [row.text for row in rows])
            lengths += [prompt + answer for prompt in prompts]
        return lengths

    def _judged(self, method: Judge, lengths: Sequence[int], answer: int) -> Cost:
        given: Any = method.settings if isinstance(method, Unseen) else method
        rows = len(lengths)
        if not runs_here(given):
            return Cost(rows=rows)
        library = self.forms.library
        located = library.of_judge(given, "judge")
        # A classifier reads so many tokens; a causal model all, with a question around them.
        most, reply = getattr(given, "max_length", None), getattr(given, "new_tokens", 0)
        model = Loaded(library.shape(located, classifier=most is not None), given.dtype)
        question = 0 if most else JUDGE_QUESTION_TOKENS
        most = most or max(lengths, default=0) + answer + question
        seen = [min(most, length + answer + question) for length in lengths]
        backend = given.backend.chosen(Checkpoint(str(located.folder), dtype=given.dtype))
        batch = min(backend.rows_at_once, rows)
        seconds = self.rates.moving(model.bytes)
        if not reply:
            return Cost(
                rows=rows,
                prompt_tokens=sum(seen),
                memory=model.bytes + memory.forward(model, batch * max(seen, default=0), 0),
                seconds=seconds + self.rates.passes(model, seen, batch, FORWARD),
            )
        return Cost(
            rows=rows,
            prompt_tokens=sum(seen),
            answer_tokens=rows * reply,
            memory=memory.generation(model, batch, max(seen, default=0), reply),
            seconds=seconds + self.rates.decoding(model, seen, reply, batch),
        )

    def _written(self, part: Defense, before: Checkpoint, after: Checkpoint) -> int:
        """Bytes of what a repair leaves."""
        model = self.forms.loaded(before)
        if part.passes_on:
            return 0
        if part.leaves == "hooks":
            return memory.FLOAT * model.shape.layers * model.shape.hidden
        if after.adapter is not None:
            return model.adapter_bytes * (EDITED_RANKS if part.leaves == "adapter" else 1)
        return model.bytes - model.adapter_bytes

    def _moving(self, checkpoint: Checkpoint) -> float:
        return self.rates.moving(self.forms.loaded(checkpoint).bytes)


def _sum(one: Cost, two: Cost) -> Cost:
    """Both, one after the other."""
    return Cost(
        one.rows + two.rows,
        one.prompt_tokens + two.prompt_tokens,
        one.answer_tokens + two.answer_tokens,
        one.disk + two.disk,
        max(one.memory, two.memory),
        one.seconds + two.seconds,
    )


def _parquet(rows: int, tokens: int) -> int:
    return rows * BYTES_PER_ROW + tokens * BYTES_PER_TOKEN
