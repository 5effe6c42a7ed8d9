"""The one place where a configuration node becomes an object."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from settings.base import Settings, closest, fields_at
from settings.errors import RelockError, SettingError, first_line

PACKAGES = ("data", "modeling", "organism", "attacks", "defenses", "evaluation", "experiments")


def plain(node: Any) -> Any:
    """Turns nested mappings and sequences into dicts and tuples, as frozen settings need."""
    if isinstance(node, Mapping):
        return {str(key): plain(value) for key, value in node.items()}
    if isinstance(node, Sequence) and not isinstance(node, str | bytes):
        return tuple(plain(value) for value in node)
    return node


def build(
    node: Mapping[str, Any],
    prefix: str,
    plugins: Sequence[str] = (),
    kind: type | None = None,
) -> Any:
    """Builds the object that `node["_target_"]` names from the rest of the node.

    Nested nodes with a `_target_` of their own are built first.

    Args:
        node: A resolved configuration node (plain mappings, no interpolations left).
        prefix: Where the node stands, for messages, e.g. "defense".
        plugins: Packages, besides this project's, that a target may come from.
        kind: The class that the target must be or inherit from, if any.

    Raises:
        SettingError: The target is missing, not allowed or not there, or its settings are wrong.
    """
    values = plain(node)
    target = values.pop("_target_", None) if isinstance(values, dict) else None
    if not isinstance(target, str):
        raise SettingError(f"{prefix}._target_ is missing; name the class that builds {prefix}")
    cls = _locate(target, prefix, plugins)
    if kind is not None and not (isinstance(cls, type) and issubclass(cls, kind)):
        raise SettingError(f"{prefix}._target_={target!r} is not a {kind.__name__.lower()}")
    values = {key: _nested(value, f"{prefix}.{key}", plugins) for key, value in values.items()}
    if isinstance(cls, type) and issubclass(cls, Settings):
        return cls.validated(values, prefix)
    _check_names(cls, values, prefix)
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        if isinstance(error, RelockError):
            raise
        raise SettingError(f"{prefix}: {error}") from error


def _nested(value: Any, prefix: str, plugins: Sequence[str]) -> Any:
    """A value with the nodes in it built, itself included."""
    if not isinstance(value, dict):
        return value
    if "_target_" in value:
        return build(value, prefix, plugins)
    return {key: _nested(each, f"{prefix}.{key}", plugins) for key, each in value.items()}


def target(built: Any) -> str:
    """The class of an object, or a class itself, as a `_target_` names it."""
    cls = built if isinstance(built, type) else type(built)
    return f"{cls.__module__}.{cls.__qualname__}"


def require_method(built: Any, base: type, method: str, instead: str) -> None:
    """Refuses (SettingError) an object whose class left out what its base leaves to it.

    `instead` says what to write.
    """
    if getattr(type(built), method) is getattr(base, method):
        raise SettingError(f"{target(built)} has no method `{method}`; {instead}")


def field_names(target: str, path: Sequence[str], plugins: Sequence[str]) -> list[str]:
    """The settings that a `_target_` has, or its section at `path`; none if it can't be built."""
    try:
        cls = _locate(target, "", plugins)
    except SettingError:
        return []
    if isinstance(cls, type) and issubclass(cls, Settings):
        return fields_at(cls, path)
    return [] if path else list(inspect.signature(cls).parameters)


def source(*built: Any) -> dict[str, str]:
    """What the code of objects from outside this project is known by, for keys.

    Returns:
        "source": the hash of the modules of their classes, and of those that these inherit from in
        the same package; nothing for this project's own, whose classes have versions.
    """
    files: dict[str, bytes] = {}
    for each in built:
        package = type(each).__module__.partition(".")[0]
        for cls in type(each).__mro__ if package not in PACKAGES else ():
            if cls.__module__.partition(".")[0] == package:
                with suppress(TypeError, OSError):  # Typed into a shell, it has no file.
                    files[cls.__module__] = Path(inspect.getfile(cls)).read_bytes()
    if not files:
        return {}
    digest = hashlib.sha256(b"\0".join(files[name] for name in sorted(files)))
    return {"source": digest.hexdigest()[:16]}


def _locate(target: str, prefix: str, plugins: Sequence[str]) -> Any:
    package = target.partition(".")[0]
    allowed = (*PACKAGES, *plugins)
    if package not in allowed:
        raise SettingError(
            f"{prefix}._target_={target!r} is outside this project; "
            f"add {package!r} to plugins to allow it (plugins=[{package}])"
        )
    module_name, _, name = target.rpartition(".")
    module = _imported(module_name, f"{prefix}._target_={target!r}")
    try:
        return getattr(module, name)
    except AttributeError:
        raise SettingError(f"{prefix}._target_={target!r}: {module_name} has no {name!r}") from None


def _imported(name: str, called: str) -> ModuleType:
    """A module by its name; `called` is the setting that names it, for messages.

    Raises:
        SettingError: It isn't there, or its code fails at a line that is named.
    """
    try:
        return importlib.import_module(name)
    except Exception as error:
        said = f"{type(error).__name__}: {first_line(error)}"
        if isinstance(error, ModuleNotFoundError):
            said = f"no module named {error.name!r}"
        elif isinstance(error, SyntaxError):
            said = f"{type(error).__name__}: {error.msg}"
        raise SettingError(f"{called} can't be imported: {said}{_place(error)}") from error


def _place(error: Exception) -> str:
    """File and line of the module whose code failed; "" where there is no such line."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [(frame.filename, frame.lineno) for frame in frames if frame.name == "<module>"]
    if isinstance(error, SyntaxError):
        places.append((str(error.filename), error.lineno))
    return f" ({places[-1][0]}, line {places[-1][1]})" if places else ""


def _check_names(cls: Any, values: Mapping[str, Any], prefix: str) -> None:
    parameters = inspect.signature(cls).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    for key in values:
        if key not in parameters:
            known = [f"{prefix}.{name}" for name in parameters]
            raise SettingError(
                f"{prefix}.{key} is not a setting; {closest(f'{prefix}.{key}', known)}"
            )
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and name not in values:
            raise SettingError(f"{prefix}.{name} is missing; set it")
