"""Verbs of the data: from source files to shards."""

import argparse
import inspect
import sys
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from medclip_lab.cli.common import Verbs, add_max_bad, add_verb, say


def add_prepare(verbs: Verbs) -> None:
    from medclip_lab.data.sources import SOURCES, source_class

    parser = verbs.add_parser("prepare", help="source files to shards", description="Source files to shards.")
    sources = parser.add_subparsers(dest="source", metavar="SOURCE", required=True)
    for name in SOURCES:
        _add_source(sources, name, source_class(name))


def _add_source(sources: Verbs, name: str, cls: type[Any]) -> None:
    """A verb for a source: the first line of its file says what it is, its fields are what it takes."""
    about = str(sys.modules[cls.__module__].__doc__).strip()
    parser = add_verb(sources, name, about.partition("\n")[0].rstrip("."), _example(name, cls), _run_prepare)
    parser.description = f"{about}\n\n{inspect.getdoc(cls)}"
    types = get_type_hints(cls)
    for option in fields(cls):
        _add_option(parser, option, types[option.name])
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--samples-per-shard", type=int, default=256, help="studies in a shard (default: 256)")
    parser.add_argument("--workers", type=int, default=None, help="processes (default: one a core)")
    parser.add_argument(
        "--executor",
        choices=("processes", "ray"),
        default="processes",
        help="ray: on the cluster of RAY_ADDRESS, whose nodes see the same folders (default: processes)",
    )
    parser.add_argument(
        "--duplicates",
        choices=("report", "drop", "ignore"),
        default="report",
        help="report: count what stands there twice; drop: also leave out later studies with an image of an earlier "
        "one, test before val before train; ignore: do not look (default: report)",
    )
    add_max_bad(parser)


def _add_option(parser: argparse.ArgumentParser, option: "Field[Any]", hint: Any) -> None:
    """An argument for a field of a source: by position if it has no default, else a flag."""
    settings: dict[str, Any] = {"help": option.metadata.get("help", "").replace("%", "%%")}
    members = [member for member in get_args(hint) if member is not NoneType]
    if NoneType in get_args(hint) and len(members) == 1:
        hint = members[0]
    if get_origin(hint) is Literal:
        settings["choices"] = get_args(hint)
    elif get_origin(hint) is tuple:
        settings |= {"nargs": "+", "type": get_args(hint)[0]}
    elif hint is bool:
        settings["action"] = argparse.BooleanOptionalAction
    else:
        settings["type"] = hint
    if option.default is MISSING:
        parser.add_argument(option.name, **settings)
        return
    if option.default is not None and "(default" not in settings["help"]:
        settings["help"] += f" (default: {option.default})"
    parser.add_argument(f"--{option.name.replace('_', '-')}", default=option.default, **settings)


def _example(name: str, cls: type[Any]) -> str:
    words = ["prepare", name]
    for option in fields(cls):
        required = option.default is MISSING
        value = option.metadata.get("example", f"path/to/{name}" if required else None)
        if value is not None:
            words += [value] if required else [f"--{option.name.replace('_', '-')}", value]
    return " ".join([*words, "--out", f"shards/{name}"])


def _run_prepare(args: argparse.Namespace) -> None:
    from medclip_lab.data.prepare import prepare
    from medclip_lab.data.sources import source_class

    cls = source_class(args.source)
    options = {option.name: getattr(args, option.name) for option in fields(cls)}
    source = cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in options.items()})
    manifest, summary = prepare(
        source,
        args.out,
        samples_per_shard=args.samples_per_shard,
        max_bad=args.max_bad,
        duplicates=args.duplicates,
        workers=args.workers,
        executor=args.executor,
        command=args.command,
    )
    say(args, manifest, summary)
