"""Models that are given as folders or hub ids, and what each adapter among them sits on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.pipeline.steps.base import Model
from modeling.checkpoint import resolve
from modeling.inspection import inspect_model
from modeling.model_files import ADAPTER_CONFIG, is_adapter
from settings import ModelError, SettingError

Resolve = Callable[[str, str | None, str], tuple[str, str]]
"""As `modeling.checkpoint.resolve`."""


@dataclass(frozen=True, slots=True)
class GivenModels:
    """Opens models that are given; what an adapter sits on, its files tell.

    Attributes:
        like: Whose dtype and prompt style they have.
        known: Base and aligned model, by what the user named each by.
        resolve: Finds files and identity.
    """

    like: Model
    known: Mapping[str, Model]
    resolve: Resolve = resolve

    def open(
        self,
        name: str,
        setting: str,
        *,
        revision: str | None = None,
        base: str | None = None,
        base_setting: str,
    ) -> Model:
        """A model by its folder or hub id.

        An adapter sits on `base` where that is given; on the weights of a known adapter where it
        goes on from that; else on what its own adapter_config.json names.

        Args:
            name: Folder or hub id.
            setting: What messages call it, e.g. "attack.model".
            revision: Hub revision.
            base: Folder or hub id of the weights under an adapter.
            base_setting: What messages call `base`.

        Raises:
            ModelError: It is missing or damaged, or nothing tells what the adapter sits on.
        """
        folder, identity = self.resolve(name, revision, setting)
        if is_adapter(folder):
            weights = self._under(name, folder, setting, base, base_setting)
            checkpoint = replace(weights.checkpoint, adapter=folder)
            identity = f"{weights.key}+{identity}"
        else:
            checkpoint = replace(self.like.checkpoint, base=folder, adapter=None)
        inspect_model(checkpoint, setting)
        return replace(self.like, checkpoint=checkpoint, key=identity)

    def _under(
        self, name: str, folder: str, setting: str, base: str | None, base_setting: str
    ) -> Model:
        """The full weights that an adapter sits on."""
        weights = self._resumed(folder) if base is None else None
        if weights is None:
            config = json.loads((Path(folder) / ADAPTER_CONFIG).read_text())
            named = base or str(config.get("base_model_name_or_path") or "")
            weights = self._named(named, asked=base is not None, setting=base_setting)
            if weights is None:
                raise ModelError(
                    f"{setting}={name!r} is an adapter on {named!r}, which is not on this machine "
                    f"and no model of this command; set {base_setting} to those weights"
                )
        return weights

    def _resumed(self, folder: str) -> Model | None:
        """The weights of a known adapter that this one goes on from."""
        for model in self.known.values():
            adapter = model.checkpoint.adapter
            if adapter is not None and _goes_on(adapter, folder):
                return self._plain(model.checkpoint.base)
        return None

    def _named(self, name: str, *, asked: bool, setting: str) -> Model | None:
        """The weights of that name: a known model's, or others that may be looked up."""
        known = self.known.get(name)
        if known is not None and known.checkpoint.adapter is None:
            return known
        if Path(name).is_dir():
            known = self._plain(str(Path(name).resolve()))
        if known is not None or not (asked or not self.known or Path(name).is_dir()):
            return known
        folder, identity = self.resolve(name, None, setting)
        return replace(
            self.like,
            checkpoint=replace(self.like.checkpoint, base=folder, adapter=None),
            key=identity,
        )

    def _plain(self, folder: str) -> Model | None:
        """The known model whose full weights lie in a folder."""
        for model in self.known.values():
            path = Path(model.checkpoint.base).resolve()
            if model.checkpoint.adapter is None and path == Path(folder).resolve():
                return model
        return None


def _goes_on(adapter: str, other: str) -> bool:
    """Whether `other` is an adapter trained on from this one."""
    from defenses.nlsr.reference import check_coordinates
    from modeling.lora import open_adapter

    try:
        check_coordinates(open_adapter(adapter, "the adapter"), open_adapter(other, "the adapter"))
    except (SettingError, ModelError):
        return False
    return True
