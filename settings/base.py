"""The base class of every settings object: frozen, strict, and clear about what is wrong."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from settings.errors import SettingError


class Settings(BaseModel):
    """Frozen settings: unknown names, wrong types and values out of range are refused.

    Subclasses state fields with pydantic's `Field`, combinations with a `model_validator`, and
    may carry behaviour (an attack's `run`, a defense's `apply`) that imports what it needs where
    it is used.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", protected_namespaces=())

    @classmethod
    def validated(cls, values: dict[str, Any], prefix: str) -> Any:
        """Builds the object from `values`.

        Args:
            values: Plain values by field name.
            prefix: Where the values stand in the configuration, e.g. "defense".

        Raises:
            SettingError: One sentence that names the setting and what to write instead.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            sentences = [_sentence(cls, detail, prefix) for detail in error.errors()]
            raise SettingError("; ".join(sentences)) from None


def closest(name: str, known: list[str]) -> str:
    """A hint for a misspelt `name`: "did you mean X?", or the list of what there is."""
    match = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {match[0]}?" if match else "known: " + ", ".join(sorted(known))


def _sentence(cls: type[BaseModel], detail: ErrorDetails, prefix: str) -> str:
    path = ".".join([prefix, *(str(part) for part in detail["loc"])]).strip(".")
    value, kind, context = detail.get("input"), detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        owner = path.rpartition(".")[0] or prefix
        known = [f"{owner}.{name}" for name in _fields_at(cls, detail["loc"][:-1])]
        return f"{path} is not a setting; {closest(path, known)}"
    if kind == "missing":
        return f"{path} is missing; set it"
    if kind == "value_error":
        return f"{path}: {context['error']}" if detail["loc"] else str(context["error"])
    expected = detail["msg"].removeprefix("Input should be ")
    return f"{path}={value!r} is not allowed; it should be {expected}"


def _fields_at(cls: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    for part in loc:
        field = cls.model_fields.get(str(part))
        if field is None or not isinstance(field.annotation, type):
            return []
        if not issubclass(field.annotation, BaseModel):
            return []
        cls = field.annotation
    return list(cls.model_fields)
