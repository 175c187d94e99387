"""YAML as recipes are written: text fields keep their characters, `1e-6` is a number, and duplicate keys are errors."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from training.config_fields import user_error


STR, INT, FLOAT, NULL = (f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "null"))
NUMBER = r"(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?"


class RecipeLoader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's numbers, without dates, octal or base-60 numbers, and without duplicate keys."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":int", ":float", ":timestamp"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in keys:
                raise yaml.composer.ComposerError(None, None, f"the key {key.value} is given twice", key.start_mark)
            keys.add(key.value)
        return node


def _construct_int(loader: RecipeLoader, node: yaml.ScalarNode) -> int:
    """Return an integer in base 10, whatever its leading zeros."""
    return int(loader.construct_scalar(node).replace("_", ""))


class RecipeDumper(yaml.SafeDumper):
    """SafeDumper that quotes text which RecipeLoader, or another reader of YAML, would take for something else."""


for _class in (RecipeLoader, RecipeDumper):
    _class.add_implicit_resolver(INT, re.compile(r"^[-+]?[0-9][0-9_]*$"), list("-+0123456789"))
    _class.add_implicit_resolver(
        FLOAT, re.compile(rf"^([-+]?({NUMBER}|\.(inf|Inf|INF))|\.(nan|NaN|NAN))$"), list("-+.0123456789")
    )
RecipeLoader.add_constructor(INT, _construct_int)


def load_yaml(text: str, hint: Any = Any) -> Any:
    """Return the value of a YAML document.

    Args:
        text: The document.
        hint: Type of the value. Scalars that a type annotation declares as text stay as they are written: under `str`,
            `2024-01-01`, `no` and `null` are text; under `str | None`, `null` is None. `~` and no value are always
            None.

    Raises:
        yaml.YAMLError: The text is not valid YAML, or a mapping has a key twice.
    """
    loader = RecipeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _keep_text(node, hint)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def dump_yaml(values: dict[str, Any]) -> str:
    """Return settings as a YAML document that `load_yaml` reads back unchanged."""
    return yaml.dump(values, Dumper=RecipeDumper, sort_keys=False)


def read_recipe(path: str, hint: Any = Any) -> dict[str, Any]:
    """Return the settings in a YAML file: a recipe, or the run_config.yaml of a run.

    Raises:
        UserError: The file cannot be read, is not valid YAML, or is not a mapping.
    """
    file = Path(path).expanduser()
    try:
        values = load_yaml(file.read_bytes().decode("utf-8-sig"), hint)
    except FileNotFoundError:
        raise user_error(f"--config {path}: there is no such file; recipes are in training/recipes/.") from None
    except IsADirectoryError:
        raise user_error(f"--config {path} is a folder; name a YAML file.") from None
    except OSError as error:
        raise user_error(f"--config {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise user_error(f"--config {path} is not UTF-8 text (byte {error.start}): save it as UTF-8.") from None
    except yaml.YAMLError as error:
        raise user_error(f"--config {path} is not valid YAML: {describe_error(error)}") from None
    if not isinstance(values, dict) or not values:
        raise user_error(f"--config {path} holds no settings; write one per line, such as `seed: 1`.")
    return settings_of_run(values)


def settings_of_run(document: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a run_config.yaml without what describes the run; recipes pass through unchanged."""
    if document.keys() == {"arguments", "versions"}:  # layout of earlier versions
        document = document["arguments"]
    return {name: value for name, value in document.items() if name != "versions"}


def describe_error(error: yaml.YAMLError) -> str:
    """Return one sentence on what is wrong with a YAML document, with the line and a way out."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    line = f"line {mark.line + 1}: " if mark else ""
    problem = problem or str(error).splitlines()[0]
    if "twice" in problem:
        return f"{line}{problem}. Keep one of the two."
    if "'\\t'" in problem:
        return f"{line}{problem}. Indent with spaces instead of tabs."
    return f"{line}{problem}. Put text with special characters such as * and {{}} in quotes."


def remove_none(hint: Any) -> tuple[Any, bool]:
    """Return the type of `hint` without None, and whether None was part of it."""
    members = typing.get_args(hint)
    if typing.get_origin(hint) in (types.UnionType, typing.Union) and type(None) in members:
        return next(member for member in members if member is not type(None)), True
    return hint, False


def is_text(hint: Any) -> bool:
    """Return whether a type is `str` or a Literal."""
    return hint is str or typing.get_origin(hint) is Literal


def _keep_text(node: yaml.Node, hint: Any) -> None:
    """Tag the scalars that `hint` declares as text as strings."""
    hint, optional = remove_none(hint)
    if isinstance(node, yaml.ScalarNode):
        if is_text(hint) and not (node.tag == NULL and (optional or node.value in ("", "~"))):
            node.tag = STR
    elif isinstance(node, yaml.SequenceNode) and typing.get_origin(hint) is list:
        for member in node.value:
            _keep_text(member, typing.get_args(hint)[0])
    elif isinstance(node, yaml.MappingNode):
        _keep_text_in_mapping(node.value, hint)


def _keep_text_in_mapping(pairs: Sequence[tuple[yaml.Node, yaml.Node]], hint: Any) -> None:
    hints = typing.get_type_hints(hint) if dataclasses.is_dataclass(hint) and isinstance(hint, type) else {}
    for key, value in pairs:
        if isinstance(key, yaml.ScalarNode) and key.value in hints:
            _keep_text(value, hints[key.value])
        elif typing.get_origin(hint) is dict:
            _keep_text(value, typing.get_args(hint)[1])
