"""The base class of every settings object: frozen, strict, and clear about what is wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from settings.errors import SettingError

# What a value should be, where pydantic says it in a programmer's words.
_EXPECTED = {
    "bool_type": "be true or false",
    "tuple_type": "be a list, such as [a,b]",
    "list_type": "be a list, such as [a,b]",
    "model_type": "be a section, such as {{NAME: VALUE}}",
    "dict_type": "be a section, such as {{NAME: VALUE}}",
    "is_instance_of": "be of the class {class}, built by a _target_",
    "string_pattern_mismatch": "match the pattern {pattern}",
    "string_too_short": "have at least {min_length} characters",
    "too_short": "have at least {min_length} items",
}
# What an empty value may be refused as.
_EMPTY = ("string_pattern_mismatch", "string_too_short", "too_short")
# Pydantic puts the member of a union, also "tuple[int, ...]", behind the name of the setting.
_SCALARS = ("int", "float", "str", "bool")

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""What every library's generator can be seeded with."""


class Settings(BaseModel):
    """Frozen settings: unknown names, wrong types and values out of range are refused.

    Subclasses state fields with pydantic's `Field`, combinations with a `model_validator`, and
    may carry behaviour (an attack's `run`, a defense's `apply`) that imports what it needs where
    it is used.
    """

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False
    )

    @classmethod
    def validated(cls, values: dict[str, Any], prefix: str) -> Any:
        """Builds the object from `values`.

        Args:
            values: Plain values by field name.
            prefix: Where the values stand in the configuration, e.g. "defense"; "" at its top.

        Raises:
            SettingError: One sentence that names the setting and what to write instead.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            raise SettingError("; ".join(_sentences(cls, error.errors(), prefix))) from None


def closest(name: str, known: list[str]) -> str:
    """A hint for a misspelt `name`: "did you mean X?", or the list of what there is.

    What all of them begin with, as "defense.", makes none of them closer.
    """
    owner = name[: name.rfind(".") + 1]
    common = owner if all(each.startswith(owner) for each in known) else ""
    last = [each.removeprefix(common) for each in known]
    match = difflib.get_close_matches(name.removeprefix(common), last, n=1)
    return f"did you mean {common}{match[0]}?" if match else "known: " + ", ".join(sorted(known))


def _sentences(cls: type[BaseModel], details: Iterable[ErrorDetails], prefix: str) -> Iterable[str]:
    """What is wrong with each setting; what the members of a union say of one is joined."""
    said: dict[str, list[str]] = {}
    for detail in details:
        sentence, expected = _sentence(cls, detail, prefix)
        said.setdefault(sentence, []).extend([expected] if expected else [])
    for sentence, alternatives in said.items():
        yield sentence + " or ".join(dict.fromkeys(alternatives)).replace(" or be ", " or ")


def _sentence(cls: type[BaseModel], detail: ErrorDetails, prefix: str) -> tuple[str, str]:
    """A sentence on a mistake, and its end: what the value should be, where it says so."""
    path, kind = _path(prefix, detail["loc"]), detail["type"]
    if kind == "extra_forbidden":
        owner = path.rpartition(".")[0]
        known = [f"{owner}.{name}".strip(".") for name in fields_at(cls, detail["loc"][:-1])]
        return f"{path} is not a setting; {closest(path, known)}", ""
    if kind == "missing":
        return f"{path} is missing; set it", ""
    if kind == "value_error":
        reason = str(detail["ctx"]["error"])
        named = not detail["loc"] or reason.startswith(path)
        return reason if named else f"{path}: {reason}", ""
    path = _path(prefix, _location(detail))
    return f"{path}={detail['input']!r} is not allowed; it should ", _expected(detail)


def _path(prefix: str, location: Iterable[int | str]) -> str:
    return ".".join([prefix, *map(str, location)]).strip(".")


def _location(detail: ErrorDetails) -> list[int | str]:
    """Where a value stands, without the member of a union that it was tried to be read as."""
    location = [part for part in detail["loc"] if "[" not in str(part)]
    return location[:-1] if location[-1:] and location[-1] in _SCALARS else location


def _expected(detail: ErrorDetails) -> str:
    """What a value should be, to follow "it should"."""
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in _EMPTY and not detail["input"]:
        return "not be empty"
    if kind in _EXPECTED:
        return _EXPECTED[kind].format(**context)
    _, should, rest = detail["msg"].partition(" should ")
    return rest if should else f"be another one ({detail['msg']})"


def fields_at(cls: type[BaseModel], loc: Sequence[int | str]) -> list[str]:
    """The names of a class's settings, or of a section of them; none where there is no section."""
    for part in loc:
        field = cls.model_fields.get(str(part))
        annotation = None if field is None else field.annotation
        nested = [
            each
            for each in (annotation, *get_args(annotation))
            if isinstance(each, type) and issubclass(each, BaseModel)
        ]
        if not nested:
            return []
        cls = nested[0]
    return list(cls.model_fields)
