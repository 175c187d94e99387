"""Dataclass fields that carry a help text and bounds, and the checks that read them."""

from __future__ import annotations

import copy
import dataclasses
import math
import operator
import os
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from modeling_amorlip.cli_amorlip import UserError


BOUNDS = {
    "gt": (operator.gt, "above"),
    "ge": (operator.ge, "at least"),
    "lt": (operator.lt, "below"),
    "le": (operator.le, "at most"),
}
"""Keys of a field's metadata that bound its value, with their comparison and their words."""


def user_error(message: str) -> UserError:
    """Return a `UserError`, imported late: its package imports torch, which `--help` need not wait for."""
    from modeling_amorlip.cli_amorlip import UserError

    return UserError(message)


def setting(
    default: Any,
    help: str,
    *,
    gt: float | None = None,
    ge: float | None = None,
    lt: float | None = None,
    le: float | None = None,
    is_path: bool = False,
    required: bool = False,
) -> Any:
    """Return a dataclass field with a help text and bounds.

    Args:
        default: Value where neither the recipe nor the command line gives one; lists and mappings are copied.
        help: A full phrase for `--help`, with the unit.
        gt, ge, lt, le: Exclusive and inclusive bounds of the number, or of every number in a list.
        is_path: Whether a leading `~` stands for the home directory.
        required: Whether an empty value is refused.
    """
    bounds = {"gt": gt, "ge": ge, "lt": lt, "le": le}
    metadata: dict[str, Any] = {name: bound for name, bound in bounds.items() if bound is not None}
    metadata |= {"help": help, "is_path": is_path, "required": required}
    if isinstance(default, (dict, list)):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def default_of(field: dataclasses.Field) -> Any:
    """Return the default value of a dataclass field that has one."""
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def check_fields(instance: Any, prefix: str = "") -> None:
    """Check that a dataclass's required fields are set and that its numbers are finite and within their bounds.

    Args:
        instance: A dataclass whose fields may have `required`, `gt`, `ge`, `lt` and `le` in their metadata.
        prefix: Written before field names in messages, such as `lora.`.

    Raises:
        UserError: A required field is empty, or a number is out of bounds or not finite.
    """
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if field.metadata.get("required") and not value:
            raise user_error(
                f"{prefix}{field.name} is not set: name it in the recipe or as --{prefix}{field.name} PATH."
            )
        numbers = value if isinstance(value, (list, tuple)) else [value]
        if not all(_is_within(number, field) for number in numbers):
            raise user_error(f"{prefix}{field.name} must be {describe_bounds(field)}, got {value}.")


def _is_within(value: Any, field: dataclasses.Field) -> bool:
    """Return whether a value is a finite number within a field's bounds, or no number at all."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return True
    within = (compare(value, field.metadata[name]) for name, (compare, _) in BOUNDS.items() if name in field.metadata)
    return math.isfinite(value) and all(within)


def describe_bounds(field: dataclasses.Field) -> str:
    """Return a field's bounds in words, such as `at least 0 and below 1`."""
    words = [f"{word} {field.metadata[name]}" for name, (_, word) in BOUNDS.items() if name in field.metadata]
    return " and ".join(words) or "a finite number"


def expand_home(instance: Any) -> None:
    """Replace a leading `~` in a dataclass's path fields, and in each path of those divided by `::`."""
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if field.metadata.get("is_path") and isinstance(value, str):
            setattr(instance, field.name, "::".join(os.path.expanduser(part) for part in value.split("::")))
