"""Options that the configuration names in a list: tasks, prompt sets, judges, and the like.

Hydra chooses one option per group; where an experiment takes several of a group, or takes them
from a list, their files are looked up here by name and built with what the configuration says of
them beside it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from attacks.prompts import AttackPrompt
from data.rows import EvaluationPrompts, TaskSource
from defenses.base import Defense
from defenses.stack import Stack
from evaluation.base import Judge
from settings import SettingError, build, first_line, plain, target
from settings.base import closest

_FILE = "file:"
# Where what differs from an option's file is said.
_SECTIONS = {"task": "tasks", "prompts": "prompts", "judge": "judges"}


class Options:
    """The options of some configuration folders, built from one resolved configuration."""

    def __init__(
        self, values: Mapping[str, Any], plugins: Sequence[str], conf: Sequence[Path]
    ) -> None:
        self.values = dict(values)
        self.plugins = plugins
        self.conf = conf

    def task(self, name: str, setting: str) -> TaskSource:
        """The task of that name: its file, the protocol's settings of it, then `tasks.NAME`.

        Raises:
            SettingError: There is no such task, or what it is built of is wrong; one sentence.
        """
        protocol = self.values["protocol"].get("tasks") or {}
        node = self._merged("task", name, setting, protocol.get(name) or {})
        task = build(node, f"tasks.{name}", self.plugins)
        if not isinstance(task, TaskSource):
            raise SettingError(
                f"tasks.{name} builds no task; its class should inherit data.rows.TaskSource"
            )
        return task

    def prompt_set(self, name: str) -> tuple[str, EvaluationPrompts]:
        """A set of prompts by its name, with the name that it has in tables, "ROLE:NAME".

        It is built from its file, then `prompts.NAME`.

        Raises:
            SettingError: As for `task`.
        """
        node = self._merged("prompts", name, "evaluation.prompt_sets", {})
        built = build(node, f"prompts.{name}", self.plugins)
        if not isinstance(built, EvaluationPrompts):
            raise SettingError(f"prompts.{name} builds no prompt set; its class needs a role")
        return f"{built.role}:{name}", built

    def judge(self, name: str) -> Judge:
        """A further judge: its file, then `judges.NAME`, where all its settings stand then.

        Raises:
            SettingError: As for `task`.
        """
        node = self._merged("judge", name, "evaluation.judges", {})
        self.values["judges"][name] = node
        return build(node, f"judges.{name}", self.plugins, Judge)

    def attack_prompt(self, name: str) -> AttackPrompt:
        """An attack prompt, under which harmful ones are asked: an option, or "file:PATH".

        Raises:
            SettingError: As for `task`.
        """
        path = name.removeprefix(_FILE)
        changes = {"path": path} if name.startswith(_FILE) else {}
        option = "file" if name.startswith(_FILE) else name
        node = self._file("attack_prompt", option, "evaluation.attack_prompts", changes)
        return build(node, f"attack_prompt.{option}", self.plugins, AttackPrompt)

    def defense(self) -> Defense:
        """The defense; of a stack the parts, whose settings then stand among the resolved ones.

        Raises:
            SettingError: As for `task`.
        """
        node = self.values["defense"]
        if node.get("_target_") != target(Stack):
            return build(node, "defense", self.plugins, Defense)
        order, changes = node.get("order"), node.get("settings") or {}
        if not isinstance(order, list) or not all(isinstance(name, str) for name in order):
            raise SettingError(
                f"defense.order={order!r} is no list of defenses; "
                "write defense.order=[nlsr,safetylock]"
            )
        for name in [key for key in node if key not in ("_target_", "order", "settings")]:
            raise SettingError(
                f"defense.{name} is no setting of a stack; {closest(name, ['order', 'settings'])} "
                f"(a part's own: +defense.settings.NAME.{name}=...)"
            )
        for name in [name for name in changes if name not in order]:
            raise SettingError(
                f"defense.settings.{name} is for a defense that defense.order doesn't name; "
                f"{closest(name, order)}"
            )
        node["settings"] = {name: self._part(name, changes.get(name) or {}) for name in order}
        built = {
            name: build(settings, f"defense.settings.{name}", self.plugins, Defense)
            for name, settings in node["settings"].items()
        }
        parts = tuple(built[name] for name in order)
        return Stack.validated({"order": tuple(order), "parts": parts}, "defense")

    def _part(self, name: str, changes: dict[str, Any]) -> dict[str, Any]:
        """A stacked defense's settings: its own file's, with those changes in their place."""
        node = self._file("defense", name, "defense.order", changes)
        if node.get("_target_") == target(Stack):
            raise SettingError(
                f"defense.order can't hold a stack ({name}); write its own defenses in its place"
            )
        return node

    def _merged(
        self, group: str, name: str, setting: str, protocol: Mapping[str, Any]
    ) -> dict[str, Any]:
        changes = (self.values.get(_SECTIONS[group]) or {}).get(name) or {}
        if "_target_" in changes:
            return dict(changes)
        return self._file(group, name, setting, {**protocol, **changes})

    def _file(
        self, group: str, name: str, setting: str, changes: Mapping[str, Any]
    ) -> dict[str, Any]:
        """An option's file with `changes` in place of its own values, interpolations resolved."""
        known = {path.stem for folder in self.conf for path in folder.glob(f"{group}/*.yaml")}
        if name not in known:
            raise SettingError(f"{setting}: {name!r} is unknown; {closest(name, list(known))}")
        option = OmegaConf.merge(read_option(group, name, self.conf), dict(changes))
        # To make a tree of all values for each option takes most of what it costs to look one up.
        named = set(re.findall(r"\w+", OmegaConf.to_yaml(option)))
        values = {key: value for key, value in self.values.items() if key in named}
        node = OmegaConf.create({**values, "option": option})
        try:
            resolved = OmegaConf.to_container(node.option, resolve=True, throw_on_missing=True)
        except MissingMandatoryValue as error:
            key = str(error.full_key).removeprefix("option.")
            where = f"+{_SECTIONS[group]}.{name}.{key}" if group in _SECTIONS else key
            raise SettingError(f"{setting}: {name} needs a {key}; add {where}=...") from None
        except OmegaConfBaseException as error:
            raise SettingError(f"{setting}: {name} can't be built ({first_line(error)})") from None
        plain_node: dict[str, Any] = plain(resolved)
        return plain_node


def read_option(group: str, name: str, conf: Sequence[Path]) -> DictConfig:
    """An option's file, on top of the files of its group that its defaults list names.

    Raises:
        SettingError: There is no such file.
    """
    files = [path for folder in conf if (path := folder / group / f"{name}.yaml").is_file()]
    if not files:
        raise SettingError(
            f"a defaults list of the group {group} names {name}, which is no file of that group; "
            "name one as PATH@_here_"
        )
    option = DictConfig(OmegaConf.load(files[-1]))
    bases = [str(each).removesuffix("@_here_") for each in option.pop("defaults", ())]
    below = [read_option(group, base, conf) for base in bases if base != "_self_"]
    return DictConfig(OmegaConf.merge(*below, option))
