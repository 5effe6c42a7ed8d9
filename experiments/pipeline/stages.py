"""What each stage does: module-level functions that fill a folder and return a report.

They take plain data and settings, so that any of them can run in a child process.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attacks.base import Attack, AttackData
from data.local import hash_rows
from data.rows import Example, PreferencePair, TaskItem, TaskSource
from defenses.base import Calibration, Defense, Models
from evaluation import engines
from evaluation.base import Backend, Judge
from experiments.pipeline.inputs import PromptSet
from experiments.store import Stage
from modeling.alignment import Alignment
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint
from modeling.measure import measured
from modeling.model_files import is_adapter
from settings import ModelError, Settings, target

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

MODEL = "model"
ROWS = "rows.parquet"

_PARTS = ("base", "adapter", "steering")


def align(
    out: Path,
    recipe: Alignment,
    base: Checkpoint,
    rows: Sequence[Example],
    pairs: Sequence[PreferencePair],
    style: PromptStyle,
) -> dict[str, Any]:
    """Makes the aligned adapter in `out/model`."""
    with tempfile.TemporaryDirectory() as scratch:
        return recipe.run(
            base,
            [(row.prompt, row.response) for row in rows],
            [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs],
            style,
            out / MODEL,
            Path(scratch),
        )


def merge(out: Path, model: Checkpoint) -> None:
    """Writes the model with its adapter merged to `out/model`."""
    from modeling.training import write_merged

    write_merged(model, out / MODEL)


def attack(
    out: Path, method: Attack, aligned: Checkpoint, data: AttackData, style: PromptStyle, seed: int
) -> dict[str, Any]:
    """Makes the attacked model in `out/model`."""
    with tempfile.TemporaryDirectory() as scratch:
        return method.run(aligned, data, style, seed, out / MODEL, Path(scratch))


def prepare(
    out: Path, defense: Defense, models: Models, calibration: Calibration
) -> dict[str, Any]:
    """Makes the defense's artefact in `out`; the report holds its cost and diagnostics.

    Answers that the store already held count with the seconds they took when they were made, so
    that the cost doesn't depend on what ran before.
    """
    import torch  # noqa: F401 - the seconds of its import are no part of the defense's cost

    with measured() as cost:
        diagnostics = defense.prepare(models, calibration, out)
    seconds = cost.seconds + getattr(calibration, "seconds_reused", 0.0)
    return {
        "cost": {"seconds": seconds, "peak_bytes": cost.peak_bytes},
        "diagnostics": diagnostics,
    }


def apply(
    out: Path, defense: Defense, artefact: Path, attacked: Checkpoint, models: Models
) -> dict[str, Any]:
    """Makes the defended model in `out/model`; the report says what was edited, at what cost.

    It also says where the defended model and those of the steps to it lie (`place`).

    Raises:
        ModelError: The defense's last step isn't its result, or a model lies outside `out`.
    """
    import torch  # noqa: F401 - the seconds of its import are no part of the defense's cost

    with measured() as cost:
        edit = defense.apply(artefact, attacked, out / MODEL, models)
    if edit.steps and edit.steps[-1].checkpoint != edit.defended:
        raise ModelError(
            f"the last step of {type(defense).__name__} ({edit.steps[-1].name}) isn't the model "
            "that it calls defended; end the steps with that model"
        )
    known = known_models(models, attacked)
    seconds = cost.seconds - edit.diagnostic_seconds
    return {
        "cost": {"seconds": seconds, "peak_bytes": cost.peak_bytes},
        "diagnostic_seconds": edit.diagnostic_seconds,
        "unchanged": edit.defended == attacked,
        "parameters_edited": edit.parameters_edited,
        "parameters_total": edit.parameters_total,
        "modules": list(edit.modules),
        "diagnostics": edit.diagnostics,
        "defended": place(edit.defended, out, known),
        "steps": [
            {
                "name": step.name,
                "parameters_edited": step.parameters_edited,
                "place": place(step.checkpoint, out, known),
            }
            for step in edit.steps
        ],
    }


def known_models(models: Models, attacked: Checkpoint) -> dict[str, Checkpoint]:
    """The models that a defense was given, whose files its results may go on using."""
    return {"attacked": attacked, "aligned": models.aligned, "base": models.base}


def place(
    checkpoint: Checkpoint, folder: Path, known: Mapping[str, Checkpoint]
) -> dict[str, str | None]:
    """Where a checkpoint's files lie, so that it is found again when the store has moved.

    Args:
        checkpoint: A model that a stage made.
        folder: The stage's folder.
        known: The models that the stage was given, by name.

    Returns:
        For weights, adapter and steering: None, a path in the folder ("model/steps/1"), or a
        known model's that has the same ("attacked:").

    Raises:
        ModelError: It is none of these.
    """
    places: dict[str, str | None] = {}
    for part in _PARTS:
        path = getattr(checkpoint, part)
        owner = next((name for name, model in known.items() if getattr(model, part) == path), None)
        if path is None:
            places[part] = None
        elif Path(path).is_relative_to(folder):
            places[part] = Path(path).relative_to(folder).as_posix()
        elif owner is not None:
            places[part] = f"{owner}:"
        else:
            raise ModelError(
                f"the defense's {part} {path!r} lies neither in its own folder nor with a model "
                "that it was given; write it to the folder that `apply` gets"
            )
    return places


def checkpoint_at(
    places: Mapping[str, str | None], folder: Path, known: Mapping[str, Checkpoint]
) -> Checkpoint:
    """The checkpoint that `place` described, its stage's folder being `folder` now."""
    found: dict[str, str | None] = {}
    revision = None
    for part, given in places.items():
        owner = known.get(given.removesuffix(":")) if given and given.endswith(":") else None
        if owner is not None:
            found[part] = getattr(owner, part)
            revision = owner.revision if part == "base" else revision
        else:
            found[part] = None if given is None else str(folder / given)
    dtype = known["attacked"].dtype
    return Checkpoint(str(found["base"]), found["adapter"], revision, dtype, found["steering"])


def identity(settings: Settings) -> dict[str, Any]:
    """Class and settings of an object, for the keys of the stages that depend on it."""
    return {"_target_": target(settings), **settings.model_dump(mode="json")}


def generation(
    backend: Backend,
    model: Checkpoint,
    style: PromptStyle,
    prompts: PromptSet,
    inputs: tuple[str, ...],
    undefended: Checkpoint | None = None,
) -> tuple[Stage, Callable[[Path], dict[str, Any]]]:
    """The `generate` stage of a model on prompts, and what makes it.

    Args:
        backend: Generates the answers; of one that chooses, the chosen one.
        model: Answers.
        style: Renders prompts.
        prompts: What is asked.
        inputs: What identifies the model's content.
        undefended: The model that it is an edit of, or None.
    """
    settings = {
        "backend": backend.identity(),
        "style": style.model_dump(),
        "dtype": model.dtype,
        "max_new_tokens": prompts.max_new_tokens,
        "system": prompts.system,
        "prompts": hash_rows(prompts.prompts),
    }
    if prompts.asked is not None:
        settings["asked"] = hash_rows(prompts.asked)
    make = partial(
        generate,
        backend=backend,
        model=model,
        style=style,
        prompts=prompts,
        undefended=undefended,
    )
    return Stage("generate", backend.version, settings, inputs), make


def generate(
    out: Path,
    backend: Backend,
    model: Checkpoint,
    style: PromptStyle,
    prompts: PromptSet,
    undefended: Checkpoint | None,
) -> dict[str, Any]:
    """Writes one row per prompt: id, category, prompt, asked, answer, tokens, truncated.

    `prompt` is what judges see; `asked` is what the model got.
    """
    import pandas as pd

    engine = engines.engine(backend, model, style, undefended)
    asked = [prompt.text for prompt in prompts.prompts]
    starts = None
    if prompts.asked is not None:
        asked = [entry.text for entry in prompts.asked]
        starts = [entry.start for entry in prompts.asked]
    answers = engine.generate(asked, prompts.max_new_tokens, prompts.system, starts)
    rows = [
        {
            "id": prompt.id,
            "category": prompt.category,
            "prompt": prompt.text,
            "asked": text,
            "answer": answer.text,
            "tokens": answer.tokens,
            "truncated": answer.truncated,
        }
        for prompt, text, answer in zip(prompts.prompts, asked, answers, strict=True)
    ]
    pd.DataFrame(rows).to_parquet(out / ROWS, index=False)
    return {"rows": len(rows), "tokens": sum(answer.tokens for answer in answers)}


def likelihood(
    out: Path,
    backend: Backend,
    model: Checkpoint,
    style: PromptStyle,
    texts: Sequence[Example],
    max_tokens: int,
    undefended: Checkpoint | None,
) -> dict[str, Any]:
    """Writes one row per held-out text: id, category, prompt, answer, tokens, truncated, nll.

    `answer` is the text; `nll` is the sum of its tokens' negative natural log-likelihoods given
    the prompt, or the tokens before it where there is none; `tokens` is how many were summed. A
    text that is longer than `max_tokens`, or than the model's context, is cut.
    """
    import pandas as pd

    engine = engines.engine(backend, model, style, undefended)
    most = min(max_tokens, engine.context or max_tokens)
    encoded = [_scored(engine.tokenizer, style, text, most) for text in texts]
    found = engine.logprobs([row.ids for row in encoded])
    rows = [
        {
            "id": str(number),
            "category": text.category,
            "prompt": text.prompt,
            "answer": text.response,
            "tokens": row.scored,
            "truncated": row.truncated,
            "nll": -math.fsum(line[-row.scored :]) if row.scored else 0.0,
        }
        for number, (text, row, line) in enumerate(zip(texts, encoded, found, strict=True))
    ]
    pd.DataFrame(rows).to_parquet(out / ROWS, index=False)
    return {"rows": len(rows), "tokens": sum(row.scored for row in encoded)}


@dataclass(frozen=True, slots=True)
class _Scored:
    """A held-out text's token ids, how many of the last are scored, and whether it was cut."""

    ids: list[int]
    scored: int
    truncated: bool


def _scored(
    tokenizer: PreTrainedTokenizerBase, style: PromptStyle, text: Example, max_tokens: int
) -> _Scored:
    if text.prompt:
        head = style.encode_prompt(tokenizer, text.prompt)
        body = style.encode_content(tokenizer, text.prompt, text.response)
    else:
        # Nothing comes before the first token, so that it can't be scored: the text's own, or the
        # BOS of a tokenizer that puts one there.
        whole = list(tokenizer(text.response)["input_ids"])
        head, body = whole[:1], whole[1:]
    ids = (head + body)[:max_tokens]
    return _Scored(ids, max(0, len(ids) - len(head)), len(head) + len(body) > max_tokens)


def judge(out: Path, method: Judge, answers: Path) -> dict[str, Any]:
    """Writes one verdict per answer: id and the fields of `Verdict`."""
    import pandas as pd

    rows = pd.read_parquet(answers / ROWS)
    verdicts = method.score(rows["prompt"].tolist(), rows["answer"].tolist())
    if len(verdicts) != len(rows):
        raise ModelError(
            f"{type(method).__name__} gave {len(verdicts)} verdicts for {len(rows)} answers; "
            "a judge must give one each, choose another or mend it"
        )
    frame = pd.DataFrame([asdict(verdict) for verdict in verdicts])
    frame.insert(0, "id", rows["id"])
    frame.to_parquet(out / ROWS, index=False)
    return {"rows": len(frame), "labels": frame["label"].value_counts().to_dict()}


def score_task(out: Path, task: TaskSource, items: Sequence[TaskItem], answers: Path) -> None:
    """Writes one row per task item: id, gold, strict, lenient, parsed, protocol."""
    import pandas as pd

    rows = pd.read_parquet(answers / ROWS)
    gold = {item.id: item.gold for item in items}
    scores = [
        {"id": id_, "gold": gold[id_], **asdict(task.score(answer, gold[id_]))}
        for id_, answer in zip(rows["id"], rows["answer"], strict=True)
    ]
    pd.DataFrame(scores).to_parquet(out / ROWS, index=False)


def read_rows(folder: Path) -> pd.DataFrame:
    """The rows that a generate, judge or score stage wrote."""
    import pandas as pd

    return pd.read_parquet(folder / ROWS)


def checkpoint_in(folder: Path, parent: Checkpoint) -> Checkpoint:
    """The model in `folder/model` that a stage made of `parent`, whose steering goes on."""
    return made(folder, parent, is_adapter(folder / MODEL))


def made(folder: Path, parent: Checkpoint, adapter: bool) -> Checkpoint:
    """The same, there or not: an adapter on the parent's full weights, or full weights."""
    path = str(folder / MODEL)
    if adapter:
        return replace(parent, adapter=path)
    return Checkpoint(path, dtype=parent.dtype, steering=parent.steering)
