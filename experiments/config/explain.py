"""The sentence that a user reads of an error, whichever library raised it; the commands' own."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.store import resource_errors
from settings import RelockError, first_line
from settings.base import closest

# Where options stand in the configuration, if not under their group's own name.
_ELSEWHERE = {
    "task": (),
    "experiment": (),
    "judge": ("evaluation.harm_judge", "evaluation.refusal_judge"),
    # As they are, and as one of those that "auto" chooses between.
    "backend": ("evaluation.backend", "evaluation.backend.{option}"),
}

# Sections that are empty until something is said there of an option that is looked up by name.
_BY_NAME = ("tasks", "prompts", "judges")


# Hydra's words where a group is set to null, in a plain ValueError.
_NULL_GROUP = "Config group override must be a string or a list"
# Optuna's at the end of a study without a best trial, in another.
_NO_TRIAL = "No trials are completed yet"


def is_users(error: BaseException) -> bool:
    """Whether it is something that a user can mend, and not this project's own."""
    if isinstance(error, RelockError | HydraException | OmegaConfBaseException):
        return True
    if isinstance(error, ValueError) and any(t in str(error) for t in (_NULL_GROUP, _NO_TRIAL)):
        return True
    return resource_errors.is_of_disk(error) or resource_errors.is_of_memory(error)


def explain(error: BaseException) -> str:
    """One sentence for `error`: what is wrong and, where that is known, what to write instead."""
    if isinstance(error, RelockError):
        return _one_line(str(error))
    if resource_errors.is_of_disk(error):
        return f"the disk of {resource_errors.disks(error, Path())} is full; free some space"
    if resource_errors.is_of_memory(error):
        return f"memory gave out; {resource_errors.lower_memory('')}"
    text = str(error).strip()
    if _NULL_GROUP in text:
        return (
            "a group of options can't be set to null; write ~GROUP to leave it out, or, for a "
            "source, sources.NAME=null"
        )
    if _NO_TRIAL in text:
        return "every trial of the search failed; the summary says why"
    missing = re.search(r"Could not find '(?P<path>[^']+)'", text)
    if missing:
        return _unknown_option(missing["path"])
    override = re.search(r"Could not override '(?P<key>[^']+)'", text)
    if override:
        return _unknown_key(override["key"], getattr(error.__cause__, "full_key", None))
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _one_line(text)
    name = type(error).__name__
    return f"{name}: {first_line(error)}" if text else name


def _unknown_option(path: str) -> str:
    from experiments.config.experiment import CONF

    group, _, option = path.rpartition("/")
    known = sorted(file.stem for file in Path(CONF, group).glob("*.yaml"))
    if not known:
        return f"{path!r} is not in the configuration"
    return f"{group}={option} is unknown; {closest(option, known)}"


def _unknown_key(key: str, missing: str | None) -> str:
    """The sentence on a key that can't be overridden; `missing` is the one that isn't there."""
    known = _known_keys()
    if key.startswith("hydra."):
        return f"{key} is not a setting; --cfg hydra shows those that Hydra and its plugins have"
    if key.partition(".")[0] in _BY_NAME and key.count(".") > 1:
        return f"{key} isn't in the configuration before it is added; write +{key}=..."
    if missing is not None and missing.startswith(f"{key}."):
        return (
            f"{key} has no {missing.removeprefix(f'{key}.')} that could be overridden; choose "
            f"another option of its group, or write ~{key} and then '+{key}=...'"
        )
    if key in known:
        owner, _, last = key.rpartition(".")
        beside = [name for name in known if name.startswith(f"{owner}.") and name != key]
        deeper = [name for name in beside if name.endswith(f".{last}")]
        instead = f"did you mean {' or '.join(deeper)}?" if deeper else "leave it out"
        return f"{key} is not a setting of the options that were chosen here; {instead}"
    deeper = [name for name in known if name.endswith(f".{key}")]
    if deeper and "." not in key:
        return f"{key} is not a setting; did you mean {' or '.join(deeper[:3])}?"
    if not difflib.get_close_matches(key, known, n=1):
        owner = key.rpartition(".")[0]
        beside = [name for name in known if name.rpartition(".")[0] == owner]
        known = beside or [name for name in known if "." not in name]
    return f"{key} is not a setting; {closest(key, known)}"


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
