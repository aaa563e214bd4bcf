"""Options are one frozen dataclass per program; every field is one flat command-line flag.

Defaults come in layers (field, data set, method, published spelling) and what the user typed lies on top. Where each
value came from is kept next to it, so a run can print and save both.
"""

import argparse
import dataclasses
import difflib
import math
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any, Literal

GROUPS = (
    "data",
    "method",
    "feature transformation",
    "published feature transformation",
    "evaluation",
    "checkpoint",
    "optimisation",
    "run",
    "processes",
)

POSITIVE = ("above 0", lambda x: x > 0)
NOT_NEGATIVE = ("0 or more", lambda x: x >= 0)
FRACTION = ("between 0 and 1", lambda x: 0 <= x <= 1)
SHARE = ("above 0 and at most 1", lambda x: 0 < x <= 1)
BELOW_ONE = ("at least 0 and below 1", lambda x: 0 <= x < 1)
SEED = ("between 0 and 2**63 - 1", lambda x: 0 <= x < 2**63)

_COLUMN, _WIDTH = 36, 100


def option(default, help: str, *, group: str, aliases=(), must=None, bare=None, spellings=None):
    """Declare an option: default, line of --help and group of --help.

    aliases: further spellings of the flag ("-k"). must: the range a number has to lie in. bare: the value of the flag
    given without one. spellings: published value -> value used here.
    """
    metadata = dict(help=help, group=group, aliases=aliases, must=must, bare=bare, spellings=spellings or {})
    return dataclasses.field(default=default, metadata=metadata)


def parse(cls, argv: list[str], *, layers: Callable[[dict], list], refused: dict[str, str], shorthands=()):
    """Turn argv into (options of type `cls`, name -> source, what was typed), or exit with one sentence.

    layers: typed values -> [(source, {name: default}), ...], lowest first. refused: flag -> why it is not taken.
    shorthands: dataclasses whose flags are parsed too, but only mean something to `layers`.
    """
    flags = [flag for group in (cls, *shorthands) for flag in _flags(group)]
    parser = _parser(flags)
    known, unknown = parser.parse_known_args([_underscored(argument) for argument in argv])
    typed = vars(known)
    wants_help = typed.pop("help", False)
    if unknown:
        parser.error(_unknown(unknown[0], parser, refused))
    own = {field.name for field in dataclasses.fields(cls)}
    try:
        on_top = {name: value for name, value in typed.items() if name in own}
        options, sources = merge(cls, [*layers(typed), ("command line", on_top)])
        if wants_help:
            print(_help(parser.prog, cls, flags, options))
            sys.exit(0)
        options.validate(typed)
    except ValueError as error:
        parser.error(str(error))
    return options, sources, typed


def merge(cls, layers: Iterable[tuple[str, dict]]):
    """Options of type `cls` from the field defaults and `layers`, later ones winning; and where each value is from."""
    values = {field.name: field.default for field in dataclasses.fields(cls)}
    sources = dict.fromkeys(values, "default")
    for source, changes in layers:
        values |= changes
        sources |= dict.fromkeys(changes, source)
    return cls(**values), sources


def to_json(options, sources: dict[str, str]) -> dict:
    """Plain numbers, strings and lists, ready for json.dump or a checkpoint."""
    values = dataclasses.asdict(options)
    return {
        "values": {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()},
        "sources": dict(sources),
    }


def describe(options, sources: dict[str, str]) -> list[str]:
    """One line per source: what each layer above the field defaults decided."""
    lines: dict[str, list[str]] = {}
    for name, source in sources.items():
        if source != "default":
            lines.setdefault(source, []).append(f"{name} {_shown(getattr(options, name))}")
    ordered = sorted(lines, key=lambda source: (source == "command line", source))
    return [f"{source}: {', '.join(lines[source])}" for source in ordered]


def check_ranges(options) -> None:
    """Raise ValueError for the first number outside the range its option declares."""
    for field in dataclasses.fields(options):
        value, must = getattr(options, field.name), field.metadata["must"]
        if must is None or value is None:
            continue
        says, holds = must
        if not all(holds(x) for x in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"--{field.name} must be {says}, not {_shown(value)}")


def _flags(cls) -> list[tuple[dataclasses.Field, tuple]]:
    """Every field of `cls` with the types its flag accepts (None only ever comes from a default)."""
    hints = typing.get_type_hints(cls)
    return [(field, _members(hints[field.name])) for field in dataclasses.fields(cls)]


def _members(hint) -> tuple:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(member for member in typing.get_args(hint) if member is not type(None))
    return (hint,)


def _parser(flags) -> argparse.ArgumentParser:
    # Without defaults the namespace holds exactly what was typed, which is the top layer.
    usage = "%(prog)s [--flag value ...]   (--help lists the flags)"
    parser = argparse.ArgumentParser(
        usage=usage, add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    parser.add_argument("-h", "--help", action="store_true")
    for field, members in flags:
        names, bare = (f"--{field.name}", *field.metadata["aliases"]), field.metadata["bare"]
        if members == (bool,):
            parser.add_argument(*names, dest=field.name, action="store_true")
            parser.add_argument(f"--no_{field.name}", dest=field.name, action="store_false")
        else:
            optional = {"nargs": "?", "const": bare} if bare else {}
            parser.add_argument(*names, dest=field.name, type=_converter(field, members), **optional)
    return parser


def _underscored(argument: str) -> str:
    """--batch-size=8 -> --batch_size=8: every flag is spelt with either."""
    if not argument.startswith("--"):
        return argument
    name, *value = argument.split("=", 1)
    return "=".join(["--" + name[2:].replace("-", "_"), *value])


def _converter(field: dataclasses.Field, members: tuple) -> Callable[[str], Any]:
    def convert(text: str):
        for member in members:
            try:
                return _value(member, field.metadata["spellings"].get(text, text))
            except ValueError:
                continue
        wanted = " or ".join(_words(member)[1] for member in members)
        raise argparse.ArgumentTypeError(f"takes {wanted}, not '{text}'")

    return convert


def _value(hint, text: str):
    if typing.get_origin(hint) is Literal:
        if text not in typing.get_args(hint):
            raise ValueError
        return text
    if typing.get_origin(hint) is tuple:
        return tuple(_value(typing.get_args(hint)[0], part) for part in text.split(",") if part.strip())
    value = hint(text)
    if hint is float and not math.isfinite(value):
        raise ValueError
    return value


def _words(hint) -> tuple[str, str]:
    """An annotation as --help abbreviates it, and as a message says it."""
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        return "|".join(choices), f"one of {', '.join(choices)}" if len(choices) > 1 else f"only {choices[0]}"
    if typing.get_origin(hint) is tuple:
        return "N,N", "whole numbers with commas between them"
    return {int: ("N", "a whole number"), float: ("X", "a number"), str: ("TEXT", "a text"), bool: ("", "no value")}[
        hint
    ]


def _unknown(argument: str, parser: argparse.ArgumentParser, refused: dict[str, str]) -> str:
    name = argument.split("=")[0]
    if name.lstrip("-") in refused:
        return f"{name} {refused[name.lstrip('-')]}"
    if not name.startswith("-"):
        return f"'{argument}' follows no flag that takes it; every value comes right after its flag"
    flags = [string for action in parser._actions for string in action.option_strings]
    near = difflib.get_close_matches(name, flags, n=1)
    return f"there is no flag {name}; " + (f"did you mean {near[0]}?" if near else "--help lists the flags")


def _help(prog: str, cls, flags, options) -> str:
    lines = [f"{prog} [--flag value ...]", "", *textwrap.wrap(cls.__doc__, _WIDTH)]
    for group in GROUPS:
        rows = [_row(field, members, options) for field, members in flags if field.metadata["group"] == group]
        lines += ["", f"{group}:", *rows] if rows else []
    return "\n".join(lines)


def _row(field: dataclasses.Field, members: tuple, options) -> str:
    """'  --flag X, -f    what it does [default]', the default being the one `options` resolved to."""
    value = getattr(options, field.name, field.default)
    name = f"--no_{field.name}" if value is True else f"--{field.name}"
    kinds = "|".join(_words(member)[0] for member in members)
    left = "  " + ", ".join([f"{name} {kinds}".rstrip(), *field.metadata["aliases"]])
    shown = "" if value in (None, "") or value is False else f" [{_shown(value)}]"
    says = f"turn off: {field.metadata['help']}" if value is True else field.metadata["help"] + shown
    right = textwrap.wrap(says, _WIDTH - _COLUMN)
    first = [left] if len(left) > _COLUMN - 2 else [left.ljust(_COLUMN) + right.pop(0)]
    return "\n".join(first + [" " * _COLUMN + line for line in right])


def _shown(value) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
