"""Settings as users give them: `key.of.it=value`, and every one that can't be used named by its key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import AliasChoices, BaseModel, ValidationError

from rho.errors import ConfigError


def validated(kind: type[Any], tree: dict[str, Any], where: str) -> Any:
    """`kind(**tree)`, with every problem named by its key."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        problems = [_problem(kind, one) for one in error.errors()]
        raise ConfigError(f"{where}: {len(problems)} setting(s) can't be used:\n" + "\n".join(problems)) from None


def _problem(kind: type[Any], error: Any) -> str:
    """One of pydantic's errors as a line."""
    *section, key = error["loc"] or [""]
    place = f"  {'.'.join(map(str, error['loc']))}: " if error["loc"] else "  "
    found = "" if isinstance(error["input"], dict) else f", found {error['input']!r}"
    if error["type"] not in ("extra_forbidden", "unexpected_keyword_argument"):
        return place + error["msg"].removeprefix("Value error, ") + found
    known = _names(kind, section)
    near = get_close_matches(str(key), known, 1)
    expected = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(known))}"
    return f"{place}no such setting{found}; {expected}"


def _names(kind: Any, place: Sequence[str | int]) -> list[str]:
    """Names of the settings of the section at a place in `kind`; of a union, of all its sections."""
    kinds = [kind]
    for key in place:
        kinds = [inner for one in kinds for inner in _inside(one, key)]
    found = [_choices(one, name) for one in kinds for name in _fields(one)]
    return list(dict.fromkeys(name for names in found for name in names))


def _choices(kind: Any, name: str) -> list[Any]:
    """What a setting may be called."""
    alias = None if is_dataclass(kind) else kind.model_fields[name].validation_alias
    return alias.choices if isinstance(alias, AliasChoices) else [name]


def _fields(kind: Any) -> dict[str, Any]:
    """The types of a section's settings, by name; none of what is no section."""
    if not (is_dataclass(kind) or (isinstance(kind, type) and issubclass(kind, BaseModel))):
        return {}
    names = [field.name for field in fields(kind)] if is_dataclass(kind) else kind.model_fields
    types = get_type_hints(kind)
    return {name: types[name] for name in names}


def _inside(kind: Any, key: str | int) -> list[Any]:
    """What may stand under a key: one of the alternatives, without None."""
    if get_origin(kind) in (dict, list, tuple):
        found = get_args(kind)[-1]
    elif key == getattr(kind, "__name__", None):  # pydantic names which of the alternatives it tried
        found = kind
    else:
        found = _fields(kind).get(str(key), NoneType)
    union = get_origin(found) in (Union, UnionType)
    return [one for one in get_args(found) if one is not NoneType] if union else [found]


def assignments(pairs: Sequence[str], option: str = "--set") -> dict[str, Any]:
    """`["a=1", "b.c=x"]` as `{"a": 1, "b": {"c": "x"}}`; values are YAML. `option` is where they come from."""
    tree: dict[str, Any] = {}
    for pair in pairs:
        assign(tree, pair, option)
    return tree


def assign(tree: dict[str, Any], override: str, option: str = "--set") -> None:
    """Put one `key.of.it=value` into a tree.

    Raises:
        ConfigError: there is no `=`, the value is not YAML, or a key on the way is no section.
    """
    key, separator, value = override.partition("=")
    if not separator:
        raise ConfigError(f"{option} {override}: expected name=value.")
    *parents, last = key.split(".")
    for parent in parents:
        section = tree.get(parent, {})
        if not isinstance(section, dict):
            raise ConfigError(f"{option} {override}: '{parent}' is not a section.")
        tree[parent] = dict(section)  # a copy: YAML's `*name` may have put it in several places
        tree = tree[parent]
    try:
        tree[last] = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError) as error:  # the second: a date that is none
        raise ConfigError(f"{option} {override}: the value is not YAML ({error}).") from error
