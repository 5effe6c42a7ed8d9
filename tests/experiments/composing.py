"""A command line's experiment, composed and validated without a run."""

from __future__ import annotations

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from experiments.config.experiment import CONF, Experiment, register_resolvers, validate
from experiments.config.explain import explain, is_users
from experiments.config.jobs import expand
from experiments.pipeline.inputs import read_inputs
from experiments.pipeline.pipeline import find_models


def composed(*overrides: str) -> Experiment:
    """What these overrides configure; raises what a run of them would say."""
    register_resolvers()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", list(overrides), return_hydra_config=True)
        choices = dict(config.hydra.runtime.choices)
        config = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
    return validate(config, choices)


def refused(*overrides: str) -> str:
    """The sentence by which a run of these overrides ends before it makes anything."""
    try:
        (job,) = expand(overrides, multirun=False)
        find_models(job.model)
        read_inputs(job)
    except Exception as error:
        if not is_users(error):
            raise
        return explain(error, overrides)
    raise AssertionError(f"{overrides} are allowed")
