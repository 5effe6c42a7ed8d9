"""The steps that measure a model: `Generate`, `Likelihood`, `JudgeAnswers` and `ScoreAnswers`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.local import hash_rows
from data.rows import Example, TaskItem, TaskSource
from evaluation import degenerate, engines
from evaluation.base import Backend, Judge, checked_verdicts
from evaluation.token_engine import Answer
from experiments.pipeline.cost import Sizes, Work, table_bytes
from experiments.pipeline.prompt_sets import PromptSet
from experiments.pipeline.steps.base import AskingStep, Model, Step, read_rows, write_rows
from experiments.store import Stage, StageResult
from modeling.chat import PromptStyle
from settings import source, target

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Generate(AskingStep):
    """A model to its answers to one set of prompts.

    One row per prompt: id, category, prompt, asked, answer, tokens, truncated. `prompt` is what
    judges see; `asked` is what the model got.

    Attributes:
        backend: Generates the answers; of one that chooses, the chosen one.
        inputs: What identifies the model's content, where it isn't its key.
    """

    model: Model
    prompts: PromptSet
    backend: Backend
    inputs: tuple[str, ...] = ()

    @cached_property
    def stage(self) -> Stage:
        settings = {
            "backend": self.backend.identity(),
            "style": self.model.style.identity(),
            "dtype": self.model.checkpoint.dtype,
            "max_new_tokens": self.prompts.max_new_tokens,
            "system": self.prompts.system,
            "prompts": hash_rows(self.prompts.prompts),
        }
        settings |= source(self.backend)
        if self.prompts.asked is not None:
            settings["asked"] = hash_rows(self.prompts.asked)
        return Stage("generate", self.backend.version, settings, self.inputs or (self.model.key,))

    @property
    def own_process(self) -> bool:
        return self.backend.own_process

    def ask(self, steps: Sequence[Generate]) -> list[list[dict[str, Any]]]:
        """Answers of this step's model to the prompts of all."""
        model, sets = self.model, [step.prompts for step in steps]
        engine = engines.engine(self.backend, model.checkpoint, model.style, model.reference)
        answers = engine.generate_sets([prompts.questions for prompts in sets])
        return [_answer_rows(*each) for each in zip(sets, answers, strict=True)]

    def report(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """How many rows, and generated tokens."""
        return {"rows": len(rows), "tokens": sum(row["tokens"] for row in rows)}

    def prompt_lengths(self, sizes: Sizes) -> list[int]:
        """Tokens of each prompt as the model gets it."""
        model, texts, starts = self.model, self.prompts.texts, self.prompts.starts
        rows = zip(texts, starts or [""] * len(texts), strict=True)
        return sizes.tokens(
            model.checkpoint, model.style, rows, self.prompts.system, answered=False
        )

    def cost(self, sizes: Sizes) -> Work:
        """Greedy answers at full length."""
        lengths, answer = self.prompt_lengths(sizes), self.prompts.max_new_tokens
        rows = len(lengths)
        disk = table_bytes(rows, 2 * sum(lengths) + rows * answer)
        model = sizes.model(self.model.checkpoint)
        return Work(disk=disk) + model.generation(lengths, answer, self.backend.rows_at_once)


def _answer_rows(prompts: PromptSet, answers: Sequence[Answer]) -> list[dict[str, Any]]:
    return [
        {
            "id": prompt.id,
            "category": prompt.category,
            "prompt": prompt.text,
            "asked": text,
            "answer": answer.text,
            "tokens": answer.tokens,
            "truncated": answer.truncated,
        }
        for prompt, text, answer in zip(prompts.prompts, prompts.texts, answers, strict=True)
    ]


@dataclass(frozen=True)
class Likelihood(Step):
    """A model to the likelihood of the held-out texts."""

    model: Model
    texts: Sequence[Example]
    max_tokens: int
    backend: Backend

    @cached_property
    def stage(self) -> Stage:
        settings = {
            "backend": self.backend.identity(),
            "style": self.model.style.identity(),
            "dtype": self.model.checkpoint.dtype,
            "texts": hash_rows(self.texts),
            "max_tokens": self.max_tokens,
            **source(self.backend),
        }
        return Stage("likelihood", self.backend.version, settings, (self.model.key,))

    @property
    def own_process(self) -> bool:
        return self.backend.own_process

    def run(self, out: Path) -> dict[str, Any]:
        """Writes one row per held-out text: id, category, prompt, answer, tokens, truncated, nll.

        `answer` is the text; `nll` is the sum of its tokens' negative natural log-likelihoods
        given the prompt, or the tokens before it where there is none; `tokens` is how many were
        summed. A text that is longer than the model's context is cut too.
        """
        model = self.model
        engine = engines.engine(self.backend, model.checkpoint, model.style, model.reference)
        most = min(self.max_tokens, engine.context or self.max_tokens)
        encoded = [_encode(engine.tokenizer, model.style, text, most) for text in self.texts]
        logprobs = engine.logprobs([ids for ids, _, _ in encoded])
        rows = [
            {
                "id": str(number),
                "category": text.category,
                "prompt": text.prompt,
                "answer": text.response,
                "tokens": scored,
                "truncated": truncated,
                "nll": -math.fsum(line[-scored:]) if scored else 0.0,
            }
            for number, (text, (_, scored, truncated), line) in enumerate(
                zip(self.texts, encoded, logprobs, strict=True)
            )
        ]
        write_rows(rows, out)
        return {"rows": len(rows), "tokens": sum(scored for _, scored, _ in encoded)}

    def cost(self, sizes: Sizes) -> Work:
        """A pass over the texts."""
        checkpoint, rows = self.model.checkpoint, [(t.prompt, t.response) for t in self.texts]
        whole = sizes.tokens(checkpoint, self.model.style, rows)
        lengths = [min(self.max_tokens, length) for length in whole]
        disk = table_bytes(len(rows), sum(lengths))
        return Work(disk=disk) + sizes.model(checkpoint).forward(lengths)


def _encode(
    tokenizer: PreTrainedTokenizerBase, style: PromptStyle, text: Example, max_tokens: int
) -> tuple[list[int], int, bool]:
    """A held-out text's token ids, how many of the last are scored, and whether it was cut."""
    if text.prompt:
        head, body = style.encode_pair(tokenizer, text.prompt, text.response, content=True)
    else:
        # Nothing comes before the first token, so that it can't be scored: the text's own, or the
        # BOS of a tokenizer that puts one there.
        whole = list(tokenizer(text.response)["input_ids"])
        head, body = whole[:1], whole[1:]
    ids = (head + body)[:max_tokens]
    return ids, max(0, len(ids) - len(head)), len(head) + len(body) > max_tokens


@dataclass(frozen=True)
class JudgeAnswers(AskingStep):
    """Answers to verdicts: one row per answer, id and the fields of `Verdict`."""

    judge: Judge
    generate: Generate
    answers: StageResult

    @cached_property
    def stage(self) -> Stage:
        settings = {"judge": target(self.judge), "settings": self.judge.identity()}
        settings |= source(self.judge)
        return Stage("judge", self.judge.version, settings, (self.answers.key,))

    @property
    def own_process(self) -> bool:
        return self.judge.own_process

    def is_stale(self, result: StageResult) -> bool:
        """Whether a verdict is an error that may pass, or by earlier rules of degeneracy."""
        by_earlier_rules = result.report.get("degeneracy") != degenerate.VERSION
        return by_earlier_rules or (self.judge.errors_pass and "errored" in result.report["labels"])

    def ask(self, steps: Sequence[JudgeAnswers]) -> list[list[dict[str, Any]]]:
        """Verdicts of this step's judge on the answers of all."""
        answers = [read_rows(step.answers.folder) for step in steps]
        prompts = [prompt for rows in answers for prompt in rows["prompt"]]
        verdicts = self.judge.score(prompts, [text for rows in answers for text in rows["answer"]])
        remaining = iter(checked_verdicts(self.judge, verdicts, len(prompts)))
        return [[{"id": id_, **asdict(next(remaining))} for id_ in rows["id"]] for rows in answers]

    def report(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """How many rows, and of each label."""
        labels = dict(Counter(row["label"] for row in rows))
        return {"rows": len(rows), "labels": labels, "degeneracy": degenerate.VERSION}

    def cost(self, sizes: Sizes) -> Work:
        """The judge's own model, where it has one here, reads prompts and whole answers."""
        answer = self.generate.prompts.max_new_tokens
        lengths = [length + answer for length in self.generate.prompt_lengths(sizes)]
        return Work(disk=table_bytes(len(lengths))) + sizes.judging(self.judge, lengths)


@dataclass(frozen=True)
class ScoreAnswers(Step):
    """Answers to a task's rows to scores."""

    task: TaskSource
    items: Sequence[TaskItem]
    generate: Generate
    answers: StageResult

    @cached_property
    def stage(self) -> Stage:
        settings = {
            "task": target(self.task),
            "reading": self.task.protocol_reading,
            "items": hash_rows(self.items),
            **source(self.task),
        }
        return Stage("score", self.task.version, settings, (self.answers.key,))

    def run(self, out: Path) -> None:
        """Writes one row per answer: id, gold, strict, lenient, parsed, protocol."""
        rows = read_rows(self.answers.folder)
        gold = {item.id: item.gold for item in self.items}
        scores = [
            {"id": id_, "gold": gold[id_], **asdict(self.task.score(answer, gold[id_]))}
            for id_, answer in zip(rows["id"], rows["answer"], strict=True)
        ]
        write_rows(scores, out)

    def cost(self, sizes: Sizes) -> Work:
        """Reading of answers: no model."""
        rows = len(self.generate.prompts.prompts)
        return Work(rows=rows, disk=table_bytes(rows))
