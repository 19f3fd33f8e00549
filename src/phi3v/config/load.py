"""Recipes and the command line, read into the tree; the options of a command line for its keys."""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import functools
import inspect
import itertools
import math
import re
import types
import typing
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from phi3v.config.data import SOURCES_HINT, DataSource, Sources
from phi3v.config.run import RunConfig
from phi3v.config.yaml_files import YamlLoader, read_yaml
from phi3v.errors import UserError
from phi3v.grammar import RECIPES, Parser, find_recipe, suggestion, words_of


@functools.cache
def _fields(cls: type) -> list[tuple[str, Any]]:
    hints = typing.get_type_hints(cls)
    return [(entry.name, hints[entry.name]) for entry in dataclasses.fields(cls)]


def _kinds(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names of every leaf and branch below ``cls``, with their types."""
    for name, kind in _fields(cls):
        yield prefix + name, kind
        if dataclasses.is_dataclass(kind):
            yield from _kinds(typing.cast(type, kind), f"{prefix}{name}.")


def known_keys() -> Iterator[str]:
    """Dotted names of every leaf and branch of the tree."""
    return (name for name, _ in _kinds(RunConfig))


def build_parser() -> Parser:
    """A parser with an option for every key of the tree."""
    parser = Parser(prog="phi3v train", add_help=False)
    add_keys(parser)
    return parser


def add_keys(parser: argparse.ArgumentParser, only: Container[str] | None = None, *, shown: bool = True) -> None:
    """Add options for keys of the tree to a parser; their values are the overrides of `load_config`.

    Args:
        only: the keys; by default all, in groups.
        shown: whether the help lists them.
    """
    _add_keys(parser, parser, RunConfig(), "", only, shown)


def add_recipe(command: argparse.ArgumentParser, *, shown: bool = False) -> None:
    """Give a command a recipe and options for every key of the tree, which are ``shown`` in its help text or not."""
    more = "" if shown else " (phi3v train --help lists the keys)"
    text = f"a YAML file, or a name of `phi3v recipes`; --key.subkey value overrides it, or stands alone{more}"
    command.add_argument("recipe", type=find_recipe, nargs="?", metavar="RECIPE", help=text)
    add_keys(command, shown=shown)


def _add_keys(parser: Any, group: Any, branch: Any, prefix: str, only: Container[str] | None, shown: bool) -> None:
    owner: type = type(branch)
    for name, kind in _fields(owner):
        key, default = prefix + name, getattr(branch, name)
        if dataclasses.is_dataclass(kind):
            is_titled = shown and only is None
            below = parser.add_argument_group(key, _docstrings(owner)[name]) if is_titled else group
            _add_keys(parser, below, default, f"{key}.", only, shown)
        elif only is None or key in only:
            kind = _required(kind)
            settings: dict[str, Any] = {"dest": key, "default": argparse.SUPPRESS, "metavar": _metavar(kind)}
            if typing.get_origin(kind) is list:
                settings |= {"nargs": "+", "action": "extend"}
            elif kind is bool:
                settings |= {"nargs": "?", "const": "true"}
            settings["help"] = argparse.SUPPRESS
            if shown:
                settings["help"] = _help(_docstrings(owner)[name], default)
            group.add_argument(f"--{key}", **settings)


def _help(text: str, default: Any) -> str:
    if default is None and "default: " in text:
        return text.replace("%", "%%")
    # As in YAML: null, true, [a, b].
    shown = f"[{', '.join(default)}]" if isinstance(default, list) else str(default)
    shown = {"None": "null", "True": "true", "False": "false"}.get(shown, shown)
    return f"{text} (default: {shown})".replace("%", "%%")


def _metavar(kind: Any) -> str:
    if typing.get_origin(kind) is list:
        return _metavar(typing.get_args(kind)[0])
    if typing.get_origin(kind) is Literal:
        return "{" + ",".join(typing.get_args(kind)) + "}"
    return {bool: "{true,false}", int: "N", float: "X", str: "TEXT"}[kind]


@functools.cache
def _docstrings(owner: type) -> dict[str, str]:
    """The docstring below each field of a class, which Python does not keep."""
    (tree,) = ast.parse(inspect.getsource(owner)).body
    assert isinstance(tree, ast.ClassDef)
    texts = {}
    for entry, text in itertools.pairwise(tree.body):
        match entry, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                texts[name] = " ".join(words.split())
    return texts


def _required(kind: Any) -> Any:
    """A type without ``| None``."""
    return next(each for each in typing.get_args(kind) if each is not types.NoneType) if _may_be_none(kind) else kind


def _may_be_none(kind: Any) -> bool:
    return types.NoneType in typing.get_args(kind)


def load_config(
    recipe: Path | None, overrides: Sequence[str] | Mapping[str, Any] = (), *, of_run: bool = False
) -> RunConfig:
    """Read a recipe and apply ``--key.subkey value`` overrides.

    Args:
        recipe: a YAML file; None for the defaults.
        overrides: command-line words, or values by key.
        of_run: ``recipe`` was written by a run and must have every group; otherwise it was truncated.

    Raises:
        UserError: the file is missing or not YAML, a key is unknown or duplicated, or a value has the wrong type or is
            out of range.
    """
    kinds = dict(_kinds(RunConfig))
    values = {} if recipe is None else _read_recipe(recipe, kinds)
    if of_run and (lacking := lacking_groups(name.split(".")[0] for name in values)):
        what = f"is incomplete: the configuration of a run has all groups, but {lacking} is missing"
        raise UserError(what, where=str(recipe), hint="copy it again")
    if not isinstance(overrides, Mapping):
        overrides = vars(build_parser().parse_args(list(overrides)))
    for name, value in overrides.items():
        values[name] = _typed(value, kinds[name], f"--{name}")
    return _build(RunConfig, values)


LATER_GROUPS = ("objective",)  # which runs of older versions lack


def lacking_groups(there: Iterable[str]) -> str:
    """The names of the groups of the tree that are missing, comma-separated."""
    there = {*there, *LATER_GROUPS}
    return ", ".join(name for name, kind in _fields(RunConfig) if dataclasses.is_dataclass(kind) and name not in there)


def _build(cls: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    settings = {}
    for name, kind in _fields(cls):
        if dataclasses.is_dataclass(kind):
            settings[name] = _build(kind, values, f"{prefix}{name}.")
        elif prefix + name in values:
            settings[name] = values[prefix + name]
    return cls(**settings)


def _typed(value: Any, kind: Any, where: str) -> Any:
    """A YAML value, or a command-line word, converted to the type of its key."""
    is_none = value is None or value in ("none", "null", ["none"], ["null"])
    if is_none and _may_be_none(kind):
        return None
    if kind == Sources:
        return _typed_sources(value, where)
    kind = _required(kind)
    if typing.get_origin(kind) is list:
        if is_none:
            return []
        values = list(value) if isinstance(value, list | tuple) else [value]
        if all(isinstance(each, str) for each in values):
            values = words_of(values)
        return [_typed(each, typing.get_args(kind)[0], where) for each in values]
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            wrong = f"must be one of {', '.join(choices)}, got {value!r}"
            raise UserError(wrong, where=where, hint=suggestion(str(value), choices))
        return value
    if kind is str:
        if not isinstance(value, str):
            raise UserError(f"must be text, got {value!r}", where=where, hint="put it in quotes")
        if not value.strip():
            raise UserError("is empty", where=where, hint="leave it out, or give a value")
        return value
    if isinstance(value, str):
        with contextlib.suppress(yaml.YAMLError, ValueError, RecursionError):
            value = read_yaml(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        wanted = {bool: "true or false", int: "a whole number", float: "a finite number"}[kind]
        raise UserError(f"must be {wanted}, got {value!r}", where=where)
    return value


def _typed_sources(value: Any, where: str) -> str | list[DataSource]:
    """A path, or a list of paths and mappings; on the command line as YAML."""
    if isinstance(value, str) and re.fullmatch(r"\s*(\[.*\]|\{.*\})\s*", value, re.DOTALL):
        try:
            value = read_yaml(value)
        except (yaml.YAMLError, ValueError, RecursionError):
            raise UserError(f"cannot be read as a list: {value}", where=where, hint=f"write {SOURCES_HINT}") from None
    if isinstance(value, dict):
        raise UserError(f"must be a path or a list, got {value!r}", where=where, hint=f"e.g. {SOURCES_HINT}")
    if not isinstance(value, list | tuple):
        path: str = _typed(value, str, where)
        return path
    return [_typed_source(entry, f"{where}[{index}]") for index, entry in enumerate(value)]


def _typed_source(entry: Any, where: str) -> DataSource:
    if isinstance(entry, DataSource):
        return entry
    kinds = dict(_fields(DataSource))
    given = entry if isinstance(entry, dict) else {"path": entry}
    for name in given:
        if name not in kinds:
            known = f"a source has the keys {', '.join(kinds)}"
            raise UserError(f"unknown key {name}", where=where, hint=suggestion(str(name), kinds, known))
    if given.get("path") is None:
        raise UserError("has no path", where=where, hint="name its file: {path: a.jsonl}")
    values = {name: _typed(value, kinds[name], f"{where}.{name}") for name, value in given.items() if value is not None}
    return DataSource(**values)


def _read_recipe(path: Path, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a recipe by dotted key."""
    try:
        loader = YamlLoader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise UserError("a recipe is a mapping of keys", where=str(path))
        values: dict[str, Any] = {}
        for name, value, line in _leaves(loader, node, kinds, str(path)):
            where = f"{path}:{line}: {name}"
            if name in values:
                raise UserError("is given twice", where=where, hint="name it once")
            values[name] = _typed(value, kinds[name], where)
    except FileNotFoundError:
        hint = suggestion(path.stem, RECIPES, "`phi3v recipes` lists those that come with phi3v")
        raise UserError("no such file, and no recipe of that name", where=str(path), hint=hint) from None
    except yaml.MarkedYAMLError as error:
        place = f"{path}:{error.problem_mark.line + 1}" if error.problem_mark else str(path)
        raise UserError(f"cannot be read as YAML: {error.problem}", where=place) from None
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        raise UserError(f"cannot be read as YAML: {error}", where=str(path)) from None
    return values


def _leaves(
    loader: YamlLoader, node: yaml.MappingNode, kinds: Mapping[str, Any], path: str, prefix: str = ""
) -> Iterator[tuple[str, Any, int]]:
    """(name, value, line) of every key below a node."""
    loader.flatten_mapping(node)
    for key, below in node.value:
        name, line = f"{prefix}{loader.construct_object(key, deep=True)}", key.start_mark.line + 1
        if name not in kinds:
            hint = suggestion(name, kinds, "see `phi3v train --help` for every key")
            raise UserError(f"unknown key {name}", where=f"{path}:{line}", hint=hint)
        is_branch = dataclasses.is_dataclass(kinds[name])
        if is_branch and isinstance(below, yaml.MappingNode):
            yield from _leaves(loader, below, kinds, path, f"{name}.")
            continue
        value = loader.construct_object(below, deep=True)
        if not is_branch:
            yield name, value, line
        elif value is not None:  # None: all keys of the group are commented out
            raise UserError(f"{name} is a group of keys, got {value!r}", where=f"{path}:{line}")
