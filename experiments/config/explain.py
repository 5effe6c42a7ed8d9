"""The sentence that a user reads of an error, whichever library raised it; the commands' own."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.store import resource_errors
from settings import RelockError, first_line
from settings.base import closest
from settings.build import field_names

# Where options stand in the configuration, if not under their group's own name; nowhere those that
# are looked up by name or set what others have.
_ELSEWHERE = {
    "task": (),
    "experiment": (),
    "scale": (),
    "prompts": (),
    "attack_prompt": (),
    "protocol": ("",),
    "poison": ("sources.poison",),
    "text": ("sources.held_out",),
    "judge": ("evaluation.harm_judge", "evaluation.refusal_judge"),
    # As they are, and as one of those that "auto" chooses between.
    "backend": ("evaluation.backend", "evaluation.backend.{option}"),
}

# Sections that are empty until something is said there of an option that is looked up by name.
_BY_NAME = ("tasks", "prompts", "judges")


# Hydra's words where a group is set to what is no name, in a plain ValueError.
_NO_NAME = "Config group override must be a string or a list"
# Where a key names nothing, and where a group is to be chosen for a place that it hasn't.
_UNKNOWN_KEY = (
    r"Could not override '(?P<key>[^']+)'"
    r"(\.\s+Did you mean to override (one of )?(?P<choices>[^?]+)\?)?"
)
# Optuna's at the end of a study without a best trial, in another.
_NO_TRIAL = "No trials are completed yet"


def is_users(error: BaseException) -> bool:
    """Whether it is something that a user can mend, and not this project's own."""
    if isinstance(error, RelockError | HydraException | OmegaConfBaseException):
        return True
    if isinstance(error, ValueError) and any(t in str(error) for t in (_NO_NAME, _NO_TRIAL)):
        return True
    return resource_errors.is_of_disk(error) or resource_errors.is_of_memory(error)


def explain(error: BaseException, overrides: Sequence[str] = ()) -> str:
    """One sentence for `error`: what is wrong and, where that is known, what to write instead.

    `overrides` are the command line's, since Hydra's errors don't say which of them is wrong.
    """
    if isinstance(error, RelockError):
        return _one_line(str(error))
    if resource_errors.is_of_disk(error):
        return f"the disk of {resource_errors.disks(error, Path())} is full; free some space"
    if resource_errors.is_of_memory(error):
        return f"memory gave out; {resource_errors.lower_memory('')}"
    text = str(error).strip()
    if _NO_NAME in text:
        return (
            "a group of options is set to the name of one, such as defense=nlsr, and not to null "
            "or a number; write ~GROUP to leave it out, or, for a source, sources.NAME=null"
        )
    if _NO_TRIAL in text:
        return "every trial of the search failed; the summary says why"
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override, text)
    missing = re.search(r"Could not find '(?P<path>[^']+)'", text)
    if missing:
        return _unknown_option(missing["path"], overrides)
    group = re.search(r"config group '(?P<group>[^']+)' does not", text)
    if group:
        return f"{group['group']} is no group of options; {closest(group['group'], _groups())}"
    override = re.search(_UNKNOWN_KEY, text)
    if override and override["choices"]:
        known = override["choices"].split(", ")
        return f"{override['key']} is not a setting; {closest(override['key'], known)}"
    if override:
        return _unknown_key(override["key"], error.__cause__)
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _one_line(text)
    name = type(error).__name__
    return f"{name}: {first_line(error)}" if text else name


def _unknown_option(path: str, overrides: Sequence[str]) -> str:
    """The sentence on an option that isn't there, called as one of the overrides has it."""
    group, _, option = path.rpartition("/")
    known = _options(group)
    if not known:
        return f"{path!r} is not in the configuration"
    called = f"{group}={option}"
    for override in reversed(overrides):
        key, _, values = override.lstrip("+").partition("=")
        for value in map(str.strip, values.split(",")):
            if f"{key.partition('@')[0]}/{value}" == path:
                called = f"{key}={value}"
    return f"{called} is unknown; {closest(option, known)}"


def _options(group: str) -> list[str]:
    from experiments.config.experiment import CONF

    return sorted(file.stem for file in Path(CONF, group).glob("*.yaml"))


def _unreadable(override: str, text: str) -> str:
    """The sentence on an override that Hydra's grammar doesn't allow, mostly an unquoted value."""
    key, _, value = override.partition("=")
    value = value.strip()
    if value.startswith("~"):  # Nobody expands what is quoted.
        value = str(Path(value).expanduser())
    quoted = '{}="{}"'.format(key, value.replace('"', '\\"'))
    with suppress(OverrideParseException):
        if (
            value[:1] not in "[{="
            and OverridesParser.create().parse_override(quoted).value() == value
        ):
            return (
                f"{override!r} can't be read: its value must be quoted; write {shlex.quote(quoted)}"
            )
    reason = _one_line(text.partition("See https")[0]).removeprefix("Error parsing override ")
    return (
        f"{override!r} can't be read ({reason}); write NAME=VALUE, a list as "
        "NAME=[A,B], and values with special characters as 'NAME=\"VALUE\"'"
    )


def _unknown_key(key: str, cause: BaseException | None) -> str:
    """The sentence on a key that can't be overridden; `cause` knows where it isn't."""
    if key.startswith("hydra."):
        return f"{key} is not a setting; --cfg hydra shows those that Hydra and its plugins have"
    if key.partition(".")[0] in _BY_NAME and key.count(".") > 1:
        return f"{key} isn't in the configuration before it is added; write +{key}=..."
    missing = getattr(cause, "full_key", None) or key
    if missing.startswith(f"{key}."):
        return (
            f"{key} has no {missing.removeprefix(f'{key}.')} that could be overridden; choose "
            f"another option of its group, or write ~{key} and then '+{key}=...'"
        )
    if group := _unchosen(missing):
        return (
            f"{key} is not a setting while {group} is null; add {group}=NAME first, "
            f"known: {', '.join(_options(group.partition('@')[0]))}"
        )
    known, (owner, _, wrong) = _known_keys(), missing.rpartition(".")
    if wrong in _class_fields(cause):
        return f"{key} isn't in the configuration before it is added; write +{key}=..."
    if owner and getattr(cause, "parent_node", None) == {}:
        return (
            f"{key} is not a setting, since {owner} holds none; set {owner} itself or, if it may "
            f"hold any name, write +{key}=..."
        )
    if key in known:
        beside = [name for name in known if name.startswith(f"{owner}.") and name != key]
        deeper = [name for name in beside if name.endswith(f".{wrong}")]
        instead = f"did you mean {' or '.join(deeper)}?" if deeper else "leave it out"
        return f"{key} is not a setting of the options that were chosen here; {instead}"
    deeper = [name for name in known if name.endswith(f".{key}")]
    if deeper and "." not in key:
        return f"{key} is not a setting; did you mean {' or '.join(deeper[:3])}?"
    here = _written_beside(cause, missing, key)
    if "@" in key or "/" in key:
        here, wrong = {group: group for group in _groups()}, key
    names = here or dict.fromkeys([*_groups(), *(name for name in known if "." not in name)])
    match = difflib.get_close_matches(wrong if here else key, names, n=1)
    if match:
        return f"{key} is not a setting; did you mean {here.get(match[0], match[0])}?"
    return f"{key} is not a setting; known: {', '.join(sorted(here.values() or names))}"


def _written_beside(cause: BaseException | None, missing: str, key: str) -> dict[str, str]:
    """The names that are where `missing` isn't, and how each is written in its place in `key`."""
    (owner, dot, _), rest = missing.rpartition("."), key.removeprefix(missing)
    node, keys = getattr(cause, "parent_node", None), set[str]()
    if isinstance(node, DictConfig):
        _collect(OmegaConf.to_container(node, resolve=False), "", keys)
    names = [name for name in keys if "." not in name]
    whole = [name for name in names if f"{name}{rest}" in keys]
    # What the chosen class has and its file doesn't is added.
    added = {} if rest else {name: f"+{owner}{dot}{name}" for name in _class_fields(cause)}
    return added | {name: f"{owner}{dot}{name}{rest if whole else ''}" for name in whole or names}


def _class_fields(cause: BaseException | None) -> list[str]:
    """The settings of the class that is built of the node in which a name wasn't found."""
    node, path = getattr(cause, "parent_node", None), list[str]()
    if not isinstance(node, DictConfig):
        return []
    plugins = tuple(OmegaConf.select(node._get_root(), "plugins", default=None) or ())
    while node is not None and not (isinstance(node, DictConfig) and "_target_" in node):
        path.insert(0, str(node._key()))
        node = node._get_parent()
    return [] if node is None else field_names(str(node["_target_"]), path, plugins)


def _unchosen(section: str) -> str | None:
    """The group of the main defaults list that is null, so that it doesn't make this section."""
    for group, option in _defaults().items():
        if option is None and group.rpartition("@")[2] == section and group not in _ELSEWHERE:
            return group
    return None


def _groups() -> list[str]:
    """What a command line chooses options of: the groups of the main defaults list, and Hydra's."""
    groups = [name for name in _defaults() if not name.startswith("override ")]
    return [*groups, "hydra/launcher", "hydra/sweeper"]


def _defaults() -> dict[str, Any]:
    """The main defaults list: the option of each group."""
    from experiments.config.experiment import CONF

    entries = OmegaConf.load(CONF / "config.yaml").defaults
    return {
        str(group): option
        for entry in entries
        if isinstance(entry, DictConfig)
        for group, option in entry.items()
    }


def _known_keys() -> list[str]:
    """Every dotted key of the configuration's files, for the hint on a misspelt one."""
    from experiments.config.experiment import CONF

    keys: set[str] = set()
    for path in CONF.rglob("*.yaml"):
        relative = path.relative_to(CONF)
        group = relative.parts[0] if len(relative.parts) > 1 else ""
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        for prefix in _ELSEWHERE.get(group, (group,)):
            _collect(content, prefix.format(option=path.stem), keys)
    return sorted(key for key in keys if not key.startswith(("hydra", "defaults")))


def _collect(node: object, prefix: str, keys: set[str]) -> None:
    if not isinstance(node, dict):
        return
    for name, value in node.items():
        if name in ("defaults", "_target_"):
            continue
        key = f"{prefix}.{name}" if prefix else str(name)
        keys.add(key)
        _collect(value, key, keys)


def _one_line(text: str) -> str:
    return " ".join(text.split())
