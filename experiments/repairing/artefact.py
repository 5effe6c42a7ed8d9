"""What `prepare` leaves: a defense's artefact in a folder that says how it was made.

It is a stage's folder as in the store, with `stage.json`; the report holds, under "repair", what
`apply` needs to go on without the command line that made it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from defenses.base import Defense
from defenses.safetylock.lock import METADATA
from experiments.config.experiment import CONF
from experiments.config.model import ModelSettings
from experiments.config.options import Options
from experiments.pipeline.pipeline import find_models
from experiments.pipeline.steps.base import Model
from experiments.store.manifest import examine
from settings import ModelError, SettingError, plain

REPAIR = "repair"


@dataclass(frozen=True)
class Artefact:
    """A prepared defense.

    Attributes:
        record: `stage.json`; {} of a lock alone, which was imported or made elsewhere.
    """

    folder: Path
    record: dict[str, Any]

    @property
    def made(self) -> dict[str, Any]:
        """Method, settings and models that it was made with."""
        known: dict[str, Any] = self.record["report"][REPAIR]
        return known

    @property
    def method(self) -> str:
        """The defense's name."""
        return str(self.made["method"]) if self.record else "safetylock"

    def defense(self, changes: Sequence[str]) -> Defense:
        """The defense, with settings changed that only `apply` reads.

        Raises:
            SettingError: A setting is wrong, or is one that the artefact depends on.
        """
        own = [each.removeprefix("defense.") for each in changes]
        node = OmegaConf.merge(self._node(), OmegaConf.from_dotlist(own))
        values = {"defense": OmegaConf.to_container(node)}
        plugins = tuple(self.made["plugins"]) if self.record else ()
        defense = Options(values, plugins, (CONF,)).defense()
        if not self.record:
            return defense
        settings = json.loads(json.dumps(defense.prepare_settings()))
        theirs = self.record["settings"]["settings"]
        changed = [name for name in settings if settings[name] != theirs.get(name)]
        if changed:
            name = changed[0]
            raise SettingError(
                f"{name}={settings[name]} is decided when a defense is prepared, and "
                f"{str(self.folder)!r} was with {name}={theirs.get(name)}; prepare another one"
            )
        if self.record["version"] != defense.prepare_version:
            raise SettingError(
                f"{str(self.folder)!r} was prepared by version {self.record['version']} of "
                f"{self.method}, and this is {defense.prepare_version}; prepare it again"
            )
        return defense

    def _node(self) -> dict[str, Any]:
        if self.record:
            node: dict[str, Any] = self.made["defense"]
            return node
        content = json.loads((self.folder / METADATA).read_text())
        chosen = {name: content[name] for name in ("k", "alpha") if content[name] is not None}
        return {
            "_target_": "defenses.safetylock.SafetyLock",
            "lock": str(self.folder),
            **chosen,
        }

    def models(self, base: str | None, aligned: str | None) -> dict[str, Model]:
        """Base and aligned model by the folder or hub id that names them; {} of a lock alone.

        Args:
            base: Where the base model is now, where it isn't at its former place.
            aligned: Likewise.

        Raises:
            ModelError: They aren't there, or aren't those it was made with.
        """
        if not self.record:
            return {}
        moved = {name: place for name, place in (("base", base), ("aligned", aligned)) if place}
        settings = ModelSettings(**plain({**self.made["model"], **moved}))
        one, two = find_models(settings)
        assert two is not None
        for name, model, made in zip(
            ("base", "aligned"), (one, two), self.record["inputs"], strict=True
        ):
            if model.key != made:
                raise ModelError(
                    f"--{name}={getattr(settings, name)!r} is {model.key}, but "
                    f"{str(self.folder)!r} was made with {made}; give that model, or prepare again"
                )
        return {settings.base: one, str(settings.aligned): two}


def open_artefact(folder: Path) -> Artefact:
    """Opens what `prepare` or `import` left.

    Raises:
        ModelError: It is neither, or damaged.
    """
    if (folder / METADATA).is_file():
        return Artefact(folder, {})
    record, wrong = examine(folder)
    if not record or REPAIR not in record["report"]:
        raise ModelError(
            f"{str(folder)!r} is no artefact; make one by python -m experiments.repair prepare"
        )
    if wrong is not None:
        raise ModelError(f"{wrong} of {str(folder)!r} is damaged; prepare it again")
    return Artefact(folder, record)
