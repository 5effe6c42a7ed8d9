"""The base class of every settings object: frozen, strict, and clear about what is wrong."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from settings.errors import SettingError

# What a value should be, where pydantic says it in a programmer's words.
_EXPECTED = {
    "bool_type": "be true or false",
    "tuple_type": "be a list, such as [a,b]",
    "string_too_short": "not be empty",
}

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
            sentences = [_sentence(cls, detail, prefix) for detail in error.errors()]
            raise SettingError("; ".join(sentences)) from None


def closest(name: str, known: list[str]) -> str:
    """A hint for a misspelt `name`: "did you mean X?", or the list of what there is.

    What all of them begin with, as "defense.", makes none of them closer.
    """
    owner = name[: name.rfind(".") + 1]
    common = owner if all(each.startswith(owner) for each in known) else ""
    last = [each.removeprefix(common) for each in known]
    match = difflib.get_close_matches(name.removeprefix(common), last, n=1)
    return f"did you mean {common}{match[0]}?" if match else "known: " + ", ".join(sorted(known))


def _sentence(cls: type[BaseModel], detail: ErrorDetails, prefix: str) -> str:
    path = ".".join([prefix, *(str(part) for part in detail["loc"])]).strip(".")
    value, kind, context = detail.get("input"), detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        owner = path.rpartition(".")[0]
        known = [f"{owner}.{name}".strip(".") for name in fields_at(cls, detail["loc"][:-1])]
        return f"{path} is not a setting; {closest(path, known)}"
    if kind == "missing":
        return f"{path} is missing; set it"
    if kind == "value_error":
        reason = str(context["error"])
        return reason if not detail["loc"] or reason.startswith(path) else f"{path}: {reason}"
    expected = _EXPECTED.get(kind) or detail["msg"].removeprefix("Input should ")
    return f"{path}={value!r} is not allowed; it should {expected}"


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
