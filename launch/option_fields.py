"""How a field of a dataclass becomes an option: one declaration makes the command line, its help and its checks.

A field that `option` makes carries an `Opt`. It knows typer, and nothing of what an option does.
"""

import types
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import typer

from models.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Opt:
    """An option, as its field in a dataclass declares it."""

    help: str
    panel: str | None = None  # heading in the help
    metavar: str | None = None  # what the help calls its value
    shown: str | None = None  # default in words, where the field's own default is None
    within: tuple[float, float | None] | None = None  # smallest and largest value
    hint: str = ""  # follows the error of a value out of bounds
    variable: str | None = None  # of the environment, where nothing is given
    called: str | None = None  # its name on the command line, if that is not the field's
    argument: bool = False  # given by its place, not by a name
    batch: bool = True  # `flowcache batch` has it too
    line: bool = False  # it is of one video, so a line of a batch file has it
    name: str = ""  # of the field; like the next two not part of the declaration, but known of the field itself
    kind: Any = None  # type of the value
    default: Any = Parameter.empty  # the same where it must be given

    @property
    def flag(self) -> str:
        """Its name on the command line."""
        return "--" + (self.called or self.name).replace("_", "-")

    @property
    def value_type(self) -> Any:
        """The type of a value that is given, without None."""
        given = [one for one in get_args(self.kind) if one is not type(None)]
        return given[0] if get_origin(self.kind) in (Union, types.UnionType) else self.kind

    def parameter(self) -> Parameter:
        """The parameter of a typer command."""
        words: dict[str, Any] = {"metavar": self.metavar, "help": self.help}
        if self.argument:
            info = typer.Argument(**words)
        else:
            name = f"{self.flag}/--no-{self.flag[2:]}" if self.value_type is bool else self.flag
            shown = True if self.shown is None else self.shown
            words |= {"envvar": self.variable, "rich_help_panel": self.panel}
            info = typer.Option(name, **words, show_default=shown)
        return Parameter(self.name, Parameter.KEYWORD_ONLY, default=self.default, annotation=Annotated[self.kind, info])

    def convert(self, value: Any) -> Any:
        """A value of the option's type, of one that a script gives; an `InputError` if it is of another kind."""
        kind = self.value_type
        if value is None or get_origin(kind) is list:
            return value
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        if value in choices:
            return value
        try:
            if choices or isinstance(value, bool) != (kind is bool) or (kind is int and value != int(value)):
                raise ValueError
            return kind(value)
        except (TypeError, ValueError):
            why = f": choose from {', '.join(choices)}" if choices else f", not of type {kind.__name__}"
            raise InputError(f"{self.name}={value!r} cannot be used{why}") from None

    def check(self, value: Any) -> None:
        """Raise an `InputError` for a value out of bounds."""
        if value is None or self.within is None:
            return
        low, high = self.within
        if not value >= low or not (high is None or value <= high):  # so that nan is neither
            most = " or more" if high is None else f" to {_figure(high)}"
            raise InputError(f"{self.flag} {value} cannot be used: give {_figure(low)}{most}{self.hint}")


def option(
    panel: str | None,
    help: str,  # noqa: A002 - the name that typer uses
    *,
    default: Any = None,
    within: tuple[float, float | None] | None = None,
    metavar: str | None = None,
    shown: str | None = None,
    hint: str = "",
    variable: str | None = None,
    called: str | None = None,
    argument: bool = False,
    batch: bool = True,
    line: bool = False,
) -> Any:
    """A field that is an option; arguments as in `Opt`, and its default."""
    opt = Opt(help, panel, metavar, shown, within, hint, variable, called, argument, batch, line)
    return field(default=default, metadata={"option": opt})


def declared(shape: type[Any]) -> tuple[Opt, ...]:
    """The options that a dataclass declares, in order; its other fields are left out."""
    kinds, found = get_type_hints(shape), []
    for one in fields(shape):
        if "option" in one.metadata:
            default = Parameter.empty if one.default is MISSING else one.default
            found.append(replace(one.metadata["option"], name=one.name, kind=kinds[one.name], default=default))
    return tuple(found)


def check_bounds(options: Any) -> None:
    """Raise an `InputError` that names the option if a value of an instance is out of bounds."""
    for one in declared(type(options)):
        one.check(getattr(options, one.name))


def command(options: Sequence[Opt], run: Callable[[Any, dict[str, Any]], None]) -> Callable[..., None]:
    """A function that typer reads as a command with these options; it calls `run` with typer's `obj` and the values."""

    def call(context: typer.Context, **given: Any) -> None:
        run(context.obj, given)

    first = Parameter("context", Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    call.__dict__["__signature__"] = Signature([first, *(one.parameter() for one in options)])
    return call


def from_values(shape: type[T], base: T | None = None, /, **values: Any) -> T:
    """An instance of a dataclass of options, of values as a script has them: names of enums and paths may be text.

    Where none is given, that of `base` holds, or the default. An `InputError` names an option that there is not, or a
    value that is not of its kind.
    """
    known = {one.name: one for one in declared(shape)}
    for name in values:
        if name not in known:
            raise InputError(f"there is no option {name}: known are {', '.join(known)}")
    given = {name: known[name].convert(value) for name, value in values.items()}
    return replace(base, **given) if base is not None else shape(**given)  # type: ignore[type-var]


def values_of(options: Any) -> dict[str, Any]:
    """What `from_values` makes these options of, as plain JSON values; paths are absolute."""
    given = {one.name: getattr(options, one.name) for one in declared(type(options))}
    plain = {name: str(value.absolute()) if isinstance(value, Path) else value for name, value in given.items()}
    return {one.name: plain[one.name] for one in declared(type(options)) if plain[one.name] != one.default}


def arguments(options: Any) -> list[str]:
    """The command line that gives these options: what is not the default, by name; arguments come last.

    Paths are made absolute, so that a process that stands in another folder finds the same files.
    """
    named, placed = list[str](), list[str]()
    for one in declared(type(options)):
        value = getattr(options, one.name)
        if one.argument:
            placed += [_text(item) for item in (value if isinstance(value, list | tuple) else [value])]
        elif isinstance(value, bool):
            named.append(one.flag if value else f"--no-{one.flag[2:]}")
        elif isinstance(value, list):
            named += [f"{one.flag}={_text(item)}" for item in value]
        elif value is not None and value != one.default:
            named.append(f"{one.flag}={_text(value)}")
    return [*named, "--", *placed]


def _text(value: Any) -> str:
    return str(value.absolute() if isinstance(value, Path) else value)


def _figure(value: float) -> str:
    return f"{int(value):,}" if value == int(value) else f"{value:g}"
