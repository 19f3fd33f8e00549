"""YAML as recipes are written in it."""

from __future__ import annotations

import re
from typing import Any

import yaml

BOOLEAN, INTEGER, FLOAT = ("tag:yaml.org,2002:" + name for name in ("bool", "int", "float"))
NUMBER = re.compile(
    r"^[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:e[-+]?[0-9]+)?$|^[-+]?\.inf$|^\.nan$", re.IGNORECASE
)


class YamlLoader(yaml.SafeLoader):
    """YAML with the scalars of YAML 1.2: ``[yes, no]`` are two strings, 1e-3 is a number, 010 is ten, 1:30 is a string.

    A duplicate key is an error; PyYAML takes the last one.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 - as PyYAML defines it
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = set()
        for key, _ in node.value:
            if key.value in keys:
                raise yaml.composer.ComposerError(None, None, f"{key.value} is given twice", key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                keys.add(key.value)
        return node


class YamlDumper(yaml.SafeDumper):
    """Quotes strings that YAML 1.1 or 1.2 would read as something else."""


YamlLoader.add_implicit_resolver(BOOLEAN, re.compile(r"^(?:[Tt]rue|TRUE|[Ff]alse|FALSE)$"), "tTfF")
YamlLoader.add_implicit_resolver(INTEGER, re.compile(r"^[-+]?[0-9][0-9_]*$"), "-+0123456789")
YamlLoader.add_constructor(INTEGER, lambda loader, node: int(node.value))
for kind in (YamlLoader, YamlDumper):
    kind.add_implicit_resolver(FLOAT, NUMBER, "-+.0123456789")


def read_yaml(text: str) -> Any:
    """The value of a YAML document, see `YamlLoader`."""
    return yaml.load(text, YamlLoader)  # a SafeLoader
