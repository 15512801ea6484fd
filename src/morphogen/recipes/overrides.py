"""Settings written as ``name=value``: found by name, checked as in a file."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable, Mapping
from types import NoneType
from typing import Any, TypeVar

from morphogen.config import Config
from morphogen.recipes.yaml_text import parse_yaml

_Kind = TypeVar("_Kind", bound=Config)


def parse_settings(texts: Iterable[str]) -> dict[str, object]:
    """Return the values in ``texts``, each ``name=value`` with a YAML value, by name.

    Raises:
        ValueError: One has no ``=``, its value is not YAML, or a name comes twice.

    Example:
        >>> parse_settings(["learning_rate=1e-3", "policy.hidden=[32, 32]"])
        {'learning_rate': 0.001, 'policy.hidden': [32, 32]}
    """
    settings: dict[str, object] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise ValueError(f"`--set` must be given name=value, got {text!r}. Write for example --set gamma=0.98.")
        if name in settings:
            raise ValueError(f"`{name}` must be set once, got it twice. Leave one out.")
        try:
            settings[name] = parse_yaml(value)
        except ValueError as error:
            raise ValueError(f"`{name}` must be given a YAML value, got {value!r}: {error}") from None
    return settings


def with_settings(config: _Kind, settings: Mapping[str, object]) -> _Kind:
    """Return ``config`` with some settings changed; a name with dots is a setting inside a setting.

    Args:
        config: As it was.
        settings: Values by name, for example ``{"gamma": 0.98, "policy.memory": "lstm"}``.

    Raises:
        ValueError: A name is unknown, or a value wrong.
    """
    return type(config)(**_placed(type(config), config.model_dump(mode="json"), settings))


def with_flags(config: _Kind, flags: Mapping[str, object], settings: Mapping[str, object]) -> _Kind:
    """Return ``config`` with ``settings`` changed, and what has a flag of its own; flags of None were not given.

    Raises:
        ValueError: A setting came by its flag as well, its name is unknown, or a value wrong.
    """
    return with_settings(config, _together(flags, settings))


def from_flags(kind: type[_Kind], flags: Mapping[str, object], settings: Mapping[str, object]) -> _Kind:
    """Return a new config of ``settings``, and of what has a flag of its own; flags of None were not given.

    Raises:
        ValueError: A setting came by its flag as well, its name is unknown, a value wrong, or one is missing.
    """
    return kind(**_placed(kind, {}, _together(flags, settings)))


def _together(flags: Mapping[str, object], settings: Mapping[str, object]) -> dict[str, object]:
    given = {name: value for name, value in flags.items() if value is not None}
    for name in given:
        if name in settings:
            raise ValueError(f"`{name}` must be given once, got it by --set and by a flag of its own. Leave one out.")
    return {**given, **settings}


def _placed(kind: type[Config], values: dict[str, Any], settings: Mapping[str, object]) -> dict[str, Any]:
    """Return ``values`` with ``settings`` where they belong."""
    for name, value in settings.items():
        _check_name(kind, name)
        place: dict[str, Any] = values
        *parents, last = name.split(".")
        for parent in parents:
            if place.get(parent) is None:  # off, or as it is by default: the others inside keep their defaults
                place[parent] = {}
            place = place[parent]
        place[last] = value
    return values


def _check_name(config: type[Config], name: str) -> None:
    """Raise ValueError unless ``name`` leads to a setting of ``config``."""
    kind: type[Config] | None = config
    seen = ""
    for part in name.split("."):
        if kind is None:
            raise ValueError(f"`{name}` is not a setting of {config.__name__}. Set `{seen[:-1]}` as a whole.")
        if part not in kind.model_fields:
            near = difflib.get_close_matches(part, kind.model_fields, n=1)
            hint = f"Did you mean `{seen}{near[0]}`?" if near else f"Known names: {', '.join(kind.model_fields)}."
            raise ValueError(f"`{name}` is not a setting of {config.__name__}. {hint}")
        kind = _config_in(kind.model_fields[part].annotation)
        seen += f"{part}."


def _config_in(annotation: object) -> type[Config] | None:
    """Return the config that ``annotation`` is, or may be besides None; None if it may be something else."""
    kinds = [kind for kind in typing.get_args(annotation) or (annotation,) if kind is not NoneType]
    [kind, *others] = kinds
    return kind if not others and isinstance(kind, type) and issubclass(kind, Config) else None
