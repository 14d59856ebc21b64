"""Dataclasses are the truth, YAML is a value of them.

A config file may say less than its dataclass, never something else: unknown keys and wrong types are refused with
the file, the line and the nearest valid name. jsonargparse checks the values.
"""

import dataclasses
import re
import typing
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from medclip_lab.errors import UserError

C = TypeVar("C")


def load_config(kind: type[C], path: Path | None, overrides: list[str] | None = None) -> C:
    """A `kind` from a YAML file and overrides such as `--optim.lr=1e-4`; what neither names keeps its default.

    Raises:
        UserError: unreadable file, unknown key, wrong type, a value the dataclass refuses.
    """
    values, lines = _read_yaml(path) if path else ({}, {})
    overridden = set()
    for text in overrides or []:
        key, value = _parse_override(text)
        overridden.add(key)
        _set(values, key, value)

    def place(key: str) -> str:
        """Where a key was written: an override, a line of the file, or the nearest line above it."""
        if any(key == o or key.startswith(f"{o}.") or o.startswith(f"{key}.") for o in overridden):
            return "command line"
        while key and key not in lines:
            key = key.rpartition(".")[0]
        return f"{path}:{lines.get(key, 1)}"

    _refuse_unknown(kind, values, "", place)
    return _build(kind, values, place)


def to_yaml(config: Any) -> str:
    """The YAML of a config dataclass; `load_config` reads it back."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)


def parser(kind: type) -> ArgumentParser:
    """The jsonargparse parser of a config dataclass, for checking and for `--help`."""
    built = ArgumentParser(exit_on_error=False, add_help=False)
    built.add_class_arguments(kind)
    return built


def shipped(name: str) -> Path:
    """A file of the package's own `configs`, as `demo.yaml` or `labelsets/chexpert14.yaml`."""
    return Path(str(files("medclip_lab.configs"))) / name


def _build(kind: type[C], values: dict[str, Any], place: Any) -> C:
    try:
        checked = parser(kind)
        return kind(**vars(checked.instantiate(checked.parse_object(values))))
    except (ArgumentError, ValueError, TypeError) as error:
        message = str(error)
        key = ".".join(re.findall(r'Parser key "([^"]+)"', message))
        reason = message.splitlines()[-1].strip()
        missing = re.search(r"arguments? (?:are|is) required: (.+)$", reason)
        if missing:
            reason = f"{missing[1]} is missing"
        raise UserError(f"{place(key)}: {key + ': ' if key else ''}{reason}") from None


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"config: cannot read {path}: {error.strerror}") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not YAML: {getattr(error, 'problem', error)}") from None
    if values is None:
        return {}, {}
    if not isinstance(values, dict):
        raise UserError(f"{path}:1: a config is a mapping of names to values")
    lines: dict[str, int] = {}
    _collect_lines(node, "", lines, path)
    return values, lines


def _collect_lines(node: Any, prefix: str, lines: dict[str, int], path: Path) -> None:
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            _collect_lines(item, f"{prefix}.{number}", lines, path)
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, value_node in node.value:
        key = f"{prefix}.{key_node.value}" if prefix else str(key_node.value)
        line = key_node.start_mark.line + 1
        if key in lines:
            raise UserError(f"{path}:{line}: {key} stands twice, first in line {lines[key]}")
        lines[key] = line
        _collect_lines(value_node, key, lines, path)


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.removeprefix("--").partition("=")
    if not equals or not key:
        raise UserError(f"cannot read {text!r}: write overrides as --section.name=value")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        return key, value


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        inner = values.setdefault(parent, {})
        if not isinstance(inner, dict):
            inner = values[parent] = {}
        values = inner
    values[last] = value


def _refuse_unknown(kind: Any, values: Any, prefix: str, place: Any) -> None:
    if isinstance(values, list) and typing.get_origin(kind) is list:
        for number, value in enumerate(values):
            _refuse_unknown(typing.get_args(kind)[0], value, f"{prefix}.{number}", place)
    if not isinstance(values, dict):
        return
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        names = [field.name for field in dataclasses.fields(kind)]
        for key, value in values.items():
            full = f"{prefix}.{key}" if prefix else str(key)
            if key not in names:
                near = get_close_matches(str(key), names, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}"
                raise UserError(f"{place(full)}: unknown key {full}; {hint}")
            _refuse_unknown(hints[key], value, full, place)
        return
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is dict and len(arguments) == 2:
        for key, value in values.items():
            _refuse_unknown(arguments[1], value, f"{prefix}.{key}", place)
    else:  # an optional dataclass, for example
        for argument in arguments:
            if dataclasses.is_dataclass(argument):
                _refuse_unknown(argument, values, prefix, place)


def _plain(value: Any) -> Any:
    """Tuples become lists, which YAML can say without a tag of Python's."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value
