"""What each stage does: module-level functions that fill a folder and return a report.

They take plain data and settings, so that any of them can run in a child process.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attacks.base import Attack, AttackData
from data.local import hash_rows
from data.rows import Example, PreferencePair, Prompt, TaskItem, TaskSource
from defenses.base import Calibration, Defense, Models
from evaluation.base import Backend, Engine, Judge
from experiments.store import Stage
from modeling.alignment import Alignment
from modeling.chat import PromptStyle
from modeling.checkpoint import STEERING_CONFIG, Checkpoint
from modeling.measure import measured
from settings import ModelError, Settings

if TYPE_CHECKING:
    import pandas as pd

MODEL = "model"
ROWS = "rows.parquet"


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
    """Makes the defended model in `out/model`; the report says what was edited, at what cost."""
    with measured() as cost:
        edit = defense.apply(artefact, attacked, out / MODEL, models)
    seconds = cost.seconds - edit.diagnostic_seconds
    return {
        "cost": {"seconds": seconds, "peak_bytes": cost.peak_bytes},
        "diagnostic_seconds": edit.diagnostic_seconds,
        "unchanged": edit.defended == attacked,
        "parameters_edited": edit.parameters_edited,
        "parameters_total": edit.parameters_total,
        "modules": list(edit.modules),
        "diagnostics": edit.diagnostics,
    }


def generation(
    backend: Backend,
    model: Checkpoint,
    style: PromptStyle,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    system: str | None,
    inputs: tuple[str, ...],
) -> tuple[Stage, Callable[[Path], dict[str, Any]]]:
    """The `generate` stage of a model on prompts, and what makes it.

    Args:
        backend: Generates the answers.
        model: Answers.
        style: Renders prompts.
        prompts: What is asked.
        max_new_tokens: Length limit of the answers.
        system: A system line, or None.
        inputs: What identifies the model's content.
    """
    settings = {
        "backend": identity(backend),
        "style": style.model_dump(),
        "dtype": model.dtype,
        "max_new_tokens": max_new_tokens,
        "system": system,
        "prompts": hash_rows(prompts),
    }
    make = partial(
        generate,
        backend=backend,
        model=model,
        style=style,
        prompts=prompts,
        max_new_tokens=max_new_tokens,
        system=system,
    )
    return Stage("generate", backend.version, settings, inputs), make


def target(built: Any) -> str:
    """The class of an object, as its `_target_` names it."""
    return f"{type(built).__module__}.{type(built).__qualname__}"


def identity(settings: Settings) -> dict[str, Any]:
    """Class and settings of an object, for the keys of the stages that depend on it."""
    return {"_target_": target(settings), **settings.model_dump(mode="json")}


def generate(
    out: Path,
    backend: Backend,
    model: Checkpoint,
    style: PromptStyle,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    system: str | None,
) -> dict[str, Any]:
    """Writes one row per prompt: id, category, prompt, answer, tokens, truncated."""
    import pandas as pd

    engine = _open(backend, model, style)
    answers = engine.generate([prompt.text for prompt in prompts], max_new_tokens, system)
    rows = [
        {
            "id": prompt.id,
            "category": prompt.category,
            "prompt": prompt.text,
            "answer": answer.text,
            "tokens": answer.tokens,
            "truncated": answer.truncated,
        }
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    pd.DataFrame(rows).to_parquet(out / ROWS, index=False)
    return {"rows": len(rows), "tokens": sum(answer.tokens for answer in answers)}


def judge(out: Path, method: Judge, answers: Path) -> dict[str, Any]:
    """Writes one verdict per answer: id, label, score, category of the verdict, truncated."""
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
    """Writes one row per task item: id, gold, strict, lenient, parsed."""
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
    """The model that a stage wrote to `folder/model`.

    That is an adapter on `parent`, full weights, or `parent` itself steered by hooks.
    """
    path = folder / MODEL
    if (path / STEERING_CONFIG).is_file():
        return replace(parent, steering=str(path))
    if (path / "adapter_config.json").is_file():
        return Checkpoint(parent.base, str(path), parent.revision, parent.dtype)
    return Checkpoint(str(path), None, None, parent.dtype)


_engines: dict[str, Engine] = {}


def _open(backend: Backend, model: Checkpoint, style: PromptStyle) -> Engine:
    """Opens a model, or goes on with the one that is open: a model answers several prompt sets."""
    wanted = json.dumps([backend.model_dump(), asdict(model), style.model_dump()], sort_keys=True)
    if wanted not in _engines:
        close_engines()
        _engines[wanted] = backend.open(model, style)
    return _engines[wanted]


def close_engines() -> None:
    """Gives back the memory of the model that was kept open."""
    while _engines:
        _engines.popitem()[1].close()
