"""YAML as people write it: plain data, and ``1e-3`` is a number."""

from __future__ import annotations

import re

import yaml


class _Loader(yaml.SafeLoader):
    """PyYAML follows YAML 1.1, where ``1e-3`` is text; here it is the number that YAML 1.2 and everyone else takes it for."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str) -> object:
    """Return the data in ``text``.

    Raises:
        ValueError: It is not YAML.

    Example:
        >>> parse_yaml("1e-3"), parse_yaml("[64, 64]"), parse_yaml("lstm")
        (0.001, [64, 64], 'lstm')
    """
    try:
        return yaml.load(text, _Loader)  # a SafeLoader: plain data alone
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
