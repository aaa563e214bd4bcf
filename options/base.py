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
    "single methods",
    "feature transformation",
    "evaluation",
    "optimisation",
    "speed",
    "run",
    "processes",
    "several nodes",
    "checkpoint",
    "published spellings",
)
# Groups whose flags --help only lists, and what it says of them together.
LISTED = {
    "single methods": "of bank, BYOL, SimSiam and SwAV; see docs/methods.md",
    "speed": "fast paths, on unless turned off; results agree to rounding; see docs/speed.md",
    "several nodes": "start the same command on each, or use torchrun",
    "checkpoint": "compared with what the encoder was trained with; without --ckpt, what to build",
    "published spellings": "still understood, see README.md",
}

POSITIVE = ("above 0", lambda x: x > 0)
NOT_NEGATIVE = ("0 or more", lambda x: x >= 0)
FRACTION = ("between 0 and 1", lambda x: 0 <= x <= 1)
SHARE = ("above 0 and at most 1", lambda x: 0 < x <= 1)
BELOW_ONE = ("at least 0 and below 1", lambda x: 0 <= x < 1)
SEED = ("between 0 and 2**63 - 1", lambda x: 0 <= x < 2**63)

_COLUMN, _WIDTH = 32, 100


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
    try:
        typed = _typed(parser, argv, refused)
        wants_help = typed.pop("help", False)
        on_top = {field.name: typed[field.name] for field in dataclasses.fields(cls) if field.name in typed}
        options, sources = merge(cls, [*layers(typed), ("command line", on_top)])
        if wants_help:
            print(_help(parser.prog, cls, flags, options, sources))
            sys.exit(0)
        options.validate(typed)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
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


def table(options, sources: dict[str, str]) -> list[str]:
    """Every option under the heading of its group: its name, its value, where the value came from."""
    lines = []
    for group in GROUPS:
        names = [field.name for field in dataclasses.fields(options) if field.metadata["group"] == group]
        rows = [f"  {name:<28} {_shown(getattr(options, name)):<20} {sources[name]}" for name in names]
        lines += [f"{group}:", *rows] if rows else []
    return lines


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
    parser = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS, exit_on_error=False
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


def _typed(parser: argparse.ArgumentParser, argv: list[str], refused: dict[str, str]) -> dict[str, Any]:
    """Flag -> value of everything in `argv`. ValueError for a flag or a value that does not exist."""
    try:
        known, unknown = parser.parse_known_args([_underscored(argument) for argument in argv])
    except argparse.ArgumentError as error:
        says = error.message.replace("expected one argument", "needs a value right after it")
        raise ValueError(f"{error.argument_name} {says}") from error
    if unknown:
        raise ValueError(_unknown(unknown[0], parser, refused))
    return vars(known)


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
        choices = {choice.lower(): choice for member in members for choice in _choices(member)}
        near = difflib.get_close_matches(text.lower(), choices, n=1)
        meant = f"; did you mean {choices[near[0]]}?" if near else ""
        raise argparse.ArgumentTypeError(f"takes {wanted}, not '{text}'{meant}")

    return convert


def _choices(hint) -> tuple[str, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def _value(hint, text: str):
    if _choices(hint):
        if text not in _choices(hint):
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
    choices = _choices(hint)
    if choices:
        return "|".join(choices), f"one of {', '.join(choices)}" if len(choices) > 1 else f"only {choices[0]}"
    if typing.get_origin(hint) is tuple:
        whole = typing.get_args(hint)[0] is int
        return (
            ("N,N", "whole numbers with commas between them") if whole else ("X,X", "numbers with commas between them")
        )
    return {int: ("N", "a whole number"), float: ("X", "a number"), str: ("TEXT", "a text"), bool: ("", "no value")}[
        hint
    ]


def _unknown(argument: str, parser: argparse.ArgumentParser, refused: dict[str, str]) -> str:
    name = argument.split("=")[0]
    if name.lstrip("-") in refused:
        return f"{name} {refused[name.lstrip('-')]}"
    if not name.startswith("-"):
        return f"'{argument}' follows no flag that takes it; every value comes right after its flag, as in --name mine"
    flags = {string.lstrip("-"): string for action in parser._actions for string in action.option_strings}
    near = _alike(name.lstrip("-").lower(), flags)
    meant = " or ".join(flags[flag] for flag in near)
    return f"there is no flag {name}; " + (f"did you mean {meant}?" if near else "--help lists the flags")


def _alike(name: str, flags: Iterable[str]) -> list[str]:
    """The flag itself behind another number of dashes, those `name` begins or abbreviates, or the most similar."""
    initials = {flag: "".join(word[0] for word in flag.split("_")) for flag in flags}
    begun = [flag for flag in flags if flag.startswith(name) or initials[flag] == name]
    return ([name] if name in flags else begun[:3]) or difflib.get_close_matches(name, flags, n=1)


def _help(prog: str, cls, flags, options, sources: dict[str, str]) -> str:
    lines = [f"{prog} [--flag value ...]", *textwrap.wrap(cls.__doc__, _WIDTH)]
    for group in GROUPS:
        members = [(field, kinds) for field, kinds in flags if field.metadata["group"] == group]
        if group in LISTED and members:
            names = ", ".join(_left(field, kinds, getattr(options, field.name, None)) for field, kinds in members)
            listed = f"{group} ({LISTED[group]}): {names}"
            lines += textwrap.wrap(listed, _WIDTH, subsequent_indent="  ", break_on_hyphens=False)
        elif members:
            lines += [f"{group}:", *(_row(field, kinds, options, sources) for field, kinds in members)]
    return "\n".join(lines)


def _left(field: dataclasses.Field, members: tuple, value: Any, *, kinds: bool = True) -> str:
    """'--flag X, -f', the value's kind being left out on demand; '--no_flag' of a switch that is on."""
    if value is True:
        return f"--no_{field.name}"
    kind = "|".join(_words(member)[0] for member in members) if kinds else ""
    return ", ".join([f"--{field.name} {kind}".rstrip(), *field.metadata["aliases"]])


def _row(field: dataclasses.Field, members: tuple, options, sources: dict[str, str]) -> str:
    """'  --flag X, -f    what it does [default, preset]', the default being the one `options` resolved to."""
    value, says = getattr(options, field.name), field.metadata["help"]
    left = _left(field, members, value)
    if len(left) > _COLUMN - 3:  # choices that are too many for the left are said on the right
        left = _left(field, members, value, kinds=False)
        choices = ", ".join(choice for member in members for choice in _choices(member))
        says += f" ({choices})" if choices else ""
    if value is True:
        says = f"turn off: {says}"
    elif value not in (None, "") and value is not False:
        says += f" [{_shown(value)}{_preset(sources[field.name])}]"
    return "\n".join(
        textwrap.wrap(says, _WIDTH, initial_indent=f"  {left} ".ljust(_COLUMN), subsequent_indent=" " * _COLUMN)
    )


def _preset(source: str) -> str:
    """', MoCov2' behind a default that the method MoCov2 changed."""
    kind, _, rest = source.partition(" ")
    marks = {"default": "", "command": ", typed", "dataset": f", {rest}", "method": f", {rest}"}
    return marks.get(kind, f", {kind}")


def _shown(value) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if value in (None, ""):
        return "-"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
