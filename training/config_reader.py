"""Reads dataclasses of settings from a YAML recipe and the command line: types and help by jsonargparse."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter

from training.config_fields import check_fields, default_of, user_error
from training.config_yaml import is_text, load_yaml, read_recipe, remove_none


T = TypeVar("T")

TYPE_NAMES = {
    int: "an integer",
    float: "a number",
    str: "text",
    bool: "true or false",
    list: "a list such as [a, b]",
    dict: "a mapping such as {name: value}",
}


MAX_CHOICES_SHOWN = 20


def read_settings(cls: type[T], argv: list[str]) -> T:
    """Return a `cls` from `[--config RECIPE] [--field value ...]`.

    The command line wins over the recipe. `--mapping.member value` sets one member, `--mapping '{member: value}'`
    replaces the mapping. Of a flag that is repeated, the last value counts.

    Raises:
        UserError: The recipe cannot be read, a field is unknown, or a value is wrong.
    """
    flags = split_flags(argv)
    recipes = [parse_words(name, words, str) for name, words in flags if name == "config"]
    if len(recipes) > 1:
        raise user_error("--config is given twice: name one recipe, and override its settings with --field value.")
    values = read_recipe(recipes[0], cls) if recipes else {}
    for name, words in flags:
        if name != "config":
            *parents, leaf = name.split(".")
            assign(values, parents, leaf, parse_words(name, words, find_type(cls, name)))
    return build(cls, values)


def split_flags(argv: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Return the flags of a command line, without their dashes, each with the words up to the next flag.

    `--name=value` and `--name value` are the same. A word with one leading dash is a value, such as -1e-8.
    """
    flags: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            flags.append((name, [value] if equals else []))
        elif not flags:
            raise user_error(f"Expected --field value, got {word!r}; see --help.")
        else:
            flags[-1][1].append(word)
    return flags


def find_type(cls: type, name: str) -> Any:
    """Return the type of a field of `cls`, or of a nested one by its dotted name; Any for members of free mappings.

    Raises:
        UserError: There is no such field; the message names the nearest one.
    """
    hint: Any = cls
    path = name.split(".")
    for depth, part in enumerate(path):
        prefix = "".join(f"{parent}." for parent in path[:depth])
        hint, _ = remove_none(hint)
        if not part:
            raise user_error(f"--{name} is no field; write --field value, or --mapping.member value.")
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            hint = _type_of_field(hint, part, prefix)
        elif hint is not Any and hint is not dict and typing.get_origin(hint) is not dict:
            raise user_error(f"--{name}: {prefix[:-1]} is no mapping; set it with --{prefix[:-1]} VALUE.")
        else:
            hint = Any
    return hint


def parse_words(name: str, words: list[str], hint: Any) -> Any:
    """Return the value that the words behind a flag stand for, as YAML, or as they are where the type is text."""
    hint, optional = remove_none(hint)
    if typing.get_origin(hint) is list and words and not words[0].startswith("[") and words != ["null"]:
        return [parse_words(name, [word], typing.get_args(hint)[0]) for word in words]
    if not words and hint is bool:
        return True
    if len(words) != 1:
        advice = "; put values with * or spaces in quotes, and write fields with two dashes" if words else ""
        raise user_error(f"--{name} takes one value, got {' '.join(words) or 'none'}{advice}.")
    if is_text(hint):
        return None if optional and words[0] == "null" else words[0]
    try:
        return load_yaml(words[0], hint)
    except yaml.YAMLError:
        return words[0]  # text in a free mapping; elsewhere the check of its type names the field


def assign(values: dict[str, Any], parents: list[str], leaf: str, value: Any) -> None:
    """Set a member of nested mappings, which are copied: YAML's anchors may share them."""
    for depth, parent in enumerate(parents):
        mapping = values.get(parent)
        if not isinstance(mapping, (dict, type(None))):
            name = ".".join(parents[: depth + 1])
            raise user_error(f"--{'.'.join(parents)}.{leaf}: {name} is {mapping!r}, which has no members.")
        values[parent] = dict(mapping or {})
        values = values[parent]
    values[leaf] = value


def build(cls: type[T], values: Any, prefix: str = "") -> T:
    """Return a `cls` dataclass from a mapping, with values converted to the types of their fields.

    Args:
        cls: A dataclass; bounds in its fields' metadata are checked (see `training.config_fields.setting`).
        values: Mapping of field names to values.
        prefix: Written before field names in messages, such as `objective_args.`.

    Raises:
        UserError: A field is unknown (the message names the nearest one) or missing, or a value is of another type, out
            of bounds, or refused by the dataclass with a ValueError.
    """
    if isinstance(values, cls):
        return values
    if not isinstance(values, Mapping):
        raise user_error(f"{prefix.rstrip('.') or 'The recipe'} must be {TYPE_NAMES[dict]}, got {values!r}.")
    converted = {
        name: convert(value, _type_of_field(cls, name, prefix), f"{prefix}{name}") for name, value in values.items()
    }
    for field in dataclasses.fields(typing.cast(Any, cls)):
        if field.name not in converted and default_of(field) is dataclasses.MISSING:
            raise user_error(f"{prefix}{field.name} is not set.")
    try:
        instance = cls(**converted)
    except ValueError as error:
        raise user_error(str(error)) from None
    check_fields(instance, prefix)
    return instance


def convert(value: Any, hint: Any, name: str) -> Any:
    """Return a value converted to a type; raise UserError with the field's name where that is impossible."""
    hint, optional = remove_none(hint)
    if optional and (value is None or (value == {} and dataclasses.is_dataclass(hint))):
        return None
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return build(hint, value, f"{name}.")
    if typing.get_origin(hint) is dict and isinstance(value, dict):
        member = typing.get_args(hint)[1]
        return value if member is Any else {key: convert(item, member, f"{name}.{key}") for key, item in value.items()}
    if hint is bool and value in (0, 1):
        return bool(value)
    if typing.get_origin(hint) is Literal and "no" in typing.get_args(hint) and str(value).lower() in ("false", "off"):
        return "no"  # YAML reads a bare `no` as false
    try:
        return _parse_value(value, hint)
    except (ArgumentError, ValueError, yaml.YAMLError):
        shown = "null" if value is None else repr(value)
        raise user_error(f"{name} must be {describe_type(hint)}{' or null' * optional}, got {shown}.") from None


def _parse_value(value: Any, hint: Any) -> Any:
    """Return a value as jsonargparse converts it to a type, with numbers written as in recipes."""
    if isinstance(value, str) and hint in (int, float):
        value = load_yaml(value)
    if value is None or (isinstance(value, str) and hint in (int, float)):
        raise ValueError("not a value of this type")
    return _parser_of(hint).parse_object({"value": value}, defaults=False).value


def describe_type(hint: Any) -> str:
    """Return a type in words, such as `an integer`."""
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, members))}"
    if origin is list and members[0] in (int, float):
        return "a list of numbers such as [0.5, 1]"
    if origin is list and typing.get_origin(members[0]) is Literal:
        return f"a list of some of {', '.join(map(str, typing.get_args(members[0])))}"
    return TYPE_NAMES.get(origin or hint, str(hint))


def unknown_name(kind: str, name: str, choices: list[str], prefix: str = "") -> str:
    """Return the message for a name that does not exist, with the nearest one or all that exist."""
    nearest = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.5)
    if nearest:
        hint = f"did you mean {prefix}{nearest[0]}?"
    elif len(choices) > MAX_CHOICES_SHOWN:
        hint = "--help lists all."
    else:
        hint = f"choose one of {', '.join(choices)}." if choices else "there are none."
    return f"Unknown {kind} {prefix}{name}: {hint}"


def _type_of_field(cls: type, name: str, prefix: str) -> Any:
    """Return the type of a dataclass's field; raise UserError with the nearest name where there is none."""
    hints = _types_of_fields(cls)
    if name in hints:
        return hints[name]
    for parent, hint in hints.items():  # a nested field, named without the mapping it is in
        nested, _ = remove_none(hint)
        if dataclasses.is_dataclass(nested) and isinstance(nested, type) and name in _types_of_fields(nested):
            raise user_error(f"Unknown field {prefix}{name}: did you mean {prefix}{parent}.{name}?")
    raise user_error(unknown_name("field", name, list(hints), prefix))


@functools.cache
def _types_of_fields(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(typing.cast(Any, cls)) if field.init}


@functools.cache
def _parser_of(hint: Any) -> ArgumentParser:
    """Return a parser of one value."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    return parser


# -- help --------------------------------------------------------------------------------------------------------------


class _HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with types and defaults, under a description whose lines are kept."""


def format_help(description: str, usage: str, groups: dict[str, type], nested: dict[str, type]) -> str:
    """Return the text of `--help`.

    Args:
        description: What the command does.
        usage: The command line.
        groups: Dataclasses of settings by the titles of their groups.
        nested: Dataclasses of nested settings by the fields they are members of.
    """
    parser = ArgumentParser(description=description, usage=usage, formatter_class=_HelpFormatter)
    parser.add_argument("--config", metavar="RECIPE", type=str, help="YAML file of settings, which flags override.")
    for title, cls in groups.items():
        _add_group(parser, title, cls, "")
    for field, cls in nested.items():
        _add_group(parser, cls.__name__, cls, f"{field}.")
    return parser.format_help()


def _add_group(parser: ArgumentParser, title: str, cls: type, prefix: str) -> None:
    group = parser.add_argument_group(title, (cls.__doc__ or "").strip())
    hints = _types_of_fields(cls)
    for field in dataclasses.fields(typing.cast(Any, cls)):
        required = field.metadata["required"]
        default = {} if required else {"default": default_of(field)}
        hint, _ = remove_none(hints[field.name])
        if dataclasses.is_dataclass(hint):
            hint, default = dict[str, Any], {"default": None}
        else:
            hint = hints[field.name]
        group.add_argument(
            f"--{prefix}{field.name}", type=hint, help=field.metadata["help"], required=required, **default
        )
