"""What can be seen to fail before the first stage, and of models as soon as they are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from attacks.base import Attack
from attacks.given import Given
from defenses.base import Defense, Models
from evaluation.base import Judge
from experiments.config.experiment import Experiment
from experiments.pipeline.inputs import Inputs
from experiments.pipeline.steps.base import Model
from modeling.checkpoint import Checkpoint, check_target_modules
from modeling.inspection import check_mergeable, check_trainable
from settings import SettingError, require_method, target

# What a sentence advises that a given model can't follow.
_OF_TRAINING = ("attack.", "alignment=own")


def check_settings(
    experiment: Experiment, inputs: Inputs, models: Sequence[Checkpoint], *, aligns: bool
) -> None:
    """Refuses what can be seen to fail before the first stage, of the models that are there by now.

    Raises:
        RelockError: One sentence that says what to set instead.
    """
    evaluation = experiment.evaluation
    judges = {
        "evaluation.harm_judge": evaluation.harm_judge,
        "evaluation.refusal_judge": evaluation.refusal_judge,
        **{f"judges.{name}": judge for name, judge in evaluation.judges.items()},
    }
    for judge in judges.values():
        require_method(judge, Judge, "score", "write one that gives a Verdict per answer")
    for attack in (experiment.attack, experiment.refine):
        if attack is not None and not isinstance(attack, Given):
            require_method(attack, Attack, "run", "write one that writes the attacked model")
    if not callable(getattr(experiment.tracker, "track", None)):
        raise SettingError(
            f"tracker={target(experiment.tracker)} has no method `track`; write one as "
            "experiments.tracking.wandb_tracker.WandbTracker has it"
        )
    for model in models:
        if aligns:
            modules = experiment.align.lora.target_modules
            check_target_modules(modules, model, "align.lora.target_modules")
        check_attacks(experiment, inputs, model)
        evaluation.backend.chosen(model).check(model)
    for setting, judge in judges.items():
        judge.check(setting)


def check_attacks(experiment: Experiment, inputs: Inputs, base: Checkpoint) -> None:
    """Refuses rows that the attacks can't be made of.

    Raises:
        RelockError: One sentence that says what to set instead.
    """
    experiment.attack.check(base, inputs.attack, "attack")
    if experiment.refine is not None and inputs.refine is not None:
        experiment.refine.check(base, inputs.refine, "refine")


def check_models(experiment: Experiment, base: Model, aligned: Model) -> None:
    """Refuses combinations of model, attack and defense that can't work.

    Raises:
        RelockError: One sentence that says what to set instead.
    """
    attack, defense = experiment.attack, experiment.defense
    if aligned.checkpoint.adapter is None and not attack.needs_full_weights:
        raise SettingError(
            "attack.adapter=resume needs an aligned model that is an adapter, but "
            "model.aligned is a full model; set attack.adapter=fresh, or model.alignment=own "
            "to align the base by the align stage"
        )
    if aligned.checkpoint.adapter is not None and not isinstance(attack, Given):
        if attack.needs_full_weights:
            check_mergeable(aligned.checkpoint, "model.aligned", "attack.adapter=resume")
        else:
            check_trainable(aligned.checkpoint, "model.aligned", "attack.adapter=fresh")
    models = Models(base.checkpoint, aligned.checkpoint)
    if isinstance(attack, Given):
        check_given(defense, models, None, f"attack.model={attack.model!r}")
    elif defense.needs_resumed_adapter and attack.needs_full_weights:
        raise SettingError(
            f"defense={experiment.labels['defense']} repairs the alignment adapter that "
            "the attack went on training, and this attack trains other weights; "
            "set attack.adapter=resume"
        )
    else:
        defense.check(models, None)
    if defense.output_form == "hooks":
        hooked = replace(base.checkpoint, steering="hooks")
        experiment.evaluation.backend.chosen(hooked).check(hooked)


def check_given(defense: Defense, models: Models, given: Checkpoint | None, called: str) -> None:
    """Refuses a given model that the defense can't run on, or its base and aligned model.

    Raises:
        SettingError: One sentence; it advises nothing of attacks that train.
    """
    try:
        defense.check(models, given)
    except SettingError as error:
        wrong, _, advice = str(error).rpartition("; ")
        if not any(setting in advice for setting in _OF_TRAINING):
            raise
        raise SettingError(
            f"{called}: {wrong}; give another model, or choose another defense"
        ) from error


def check_refine(refine: Attack, defended: Checkpoint) -> None:
    """Refuses to go on training an adapter that isn't there.

    Raises:
        SettingError: One sentence that says what to set instead.
    """
    if defended.adapter is None and not refine.needs_full_weights:
        raise SettingError(
            "refine.adapter=resume goes on training an adapter, and the defended model is "
            "none; set refine.adapter=fresh"
        )
