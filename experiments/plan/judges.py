"""`LocalJudge`, judges whose models are run on this machine, and `PlaceholderJudge`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol, runtime_checkable

from evaluation.base import Backend, Judge, Verdict
from evaluation.judges.strongreject import StrongRejectJudge
from experiments.config.experiment import Experiment
from experiments.plan.models import Library, Located

_ADAPTER = "adapter_config.json"


@runtime_checkable
class LocalJudge(Protocol):
    """A judge that runs a model here, and isn't words or somebody's endpoint."""

    model: str
    revision: str | None
    dtype: str
    backend: Backend | None


@runtime_checkable
class WritingJudge(LocalJudge, Protocol):
    """A judge whose model writes replies of at most `new_tokens`; others are classifiers."""

    @property
    def new_tokens(self) -> int: ...


class PlaceholderJudge(Judge):
    """Stands for a judge whose weights aren't here: all that it would judge counts as to run.

    Attributes:
        name: The judge's class.
        judge: Its settings.
    """

    name: str
    judge: Judge

    def score(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """Nothing is judged in a plan."""
        raise NotImplementedError


def with_placeholders(experiment: Experiment, library: Library) -> Experiment:
    """The experiment with placeholders for judges whose weights aren't on this machine.

    Raises:
        ModelError: Nothing is known of a judge's model; one sentence.
    """

    def here(judge: Judge, setting: str) -> Judge:
        if not isinstance(judge, LocalJudge) or weights_of(library, judge, setting).here:
            return judge
        return PlaceholderJudge(name=type(judge).__name__, judge=judge)

    evaluation = experiment.evaluation
    judges = {name: here(judge, f"judges.{name}") for name, judge in evaluation.judges.items()}
    harm_judge = here(evaluation.harm_judge, "evaluation.harm_judge")
    refusal_judge = here(evaluation.refusal_judge, "evaluation.refusal_judge")
    here_evaluation = replace(
        evaluation, judges=judges, harm_judge=harm_judge, refusal_judge=refusal_judge
    )
    return replace(experiment, evaluation=here_evaluation)


def weights_of(library: Library, judge: LocalJudge, setting: str) -> Located:
    """The full weights that a judge runs on: its own, or those that its adapter is put on.

    Raises:
        ModelError: Not even its config.json can be had; one sentence.
    """
    base = judge.base if isinstance(judge, StrongRejectJudge) else None
    base = base or _adapted_model(judge.model, judge.revision)
    if base is not None:
        return library.locate(base, None, f"{setting}.model")
    return library.locate(judge.model, judge.revision, f"{setting}.model")


def _adapted_model(name: str, revision: str | None) -> str | None:
    """The base that an adapter names; None for full weights, and where it can't be looked up."""
    from huggingface_hub import hf_hub_download, is_offline_mode

    path = Path(name) / _ADAPTER
    if not Path(name).is_dir():
        try:
            path = Path(
                hf_hub_download(
                    name, _ADAPTER, revision=revision, local_files_only=is_offline_mode()
                )
            )
        except Exception:
            # Most are no adapters; what the hub's HTTP library raises is no error of its own.
            return None
    if not path.is_file():
        return None
    return str(json.loads(path.read_text())["base_model_name_or_path"])
