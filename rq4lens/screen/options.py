"""Command-line options made from the configuration, so that both say the same."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from typer.core import TyperCommand

from rq4lens.cluster.many import Many
from rq4lens.config import PARTS, SETTINGS, RunConfig, Settings, config_from, preset, read_config
from rq4lens.errors import UserError

PATHS = ("base", "tuned", "prompts", "cache")
"""Settings that name a file or folder, or a hub id in its place."""

NO_OPTION = ("about",)
"""Settings of a file that decide nothing."""

NEEDED = ("pair", "base", "tuned", "prompts", "layer")
"""The settings that everyone needs; their options stand first."""

PANELS = {
    "pair": "Pair",
    "reading": "Prompts",
    "patching": "Patch",
    "effort": "Effort",
    "place": "Place",
}
"""Where the help lists the settings of each part."""

DIRECTORY, MANY = "Run directory", "Many processes"

ORDER = ("Arguments", "Options", DIRECTORY, *PANELS.values(), MANY)
"""The panels of the help."""


# An option in one of these two panels of the help.
in_directory = functools.partial(typer.Option, rich_help_panel=DIRECTORY)
of_many = functools.partial(typer.Option, rich_help_panel=MANY)


class Paneled(TyperCommand):
    """A command whose help lists its options panel by panel."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then the panels."""
        panels: dict[str, list[tuple[str, str]]] = {title: [] for title in ORDER}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            title = "Arguments" if parameter.param_type_name == "argument" else "Options"
            title = getattr(parameter, "rich_help_panel", None) or title
            if record is not None:
                panels[title].append(record)
        for title, records in panels.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


ConfigFile = Annotated[
    Path | None,
    typer.Argument(metavar="CONFIG", help="TOML file, or the run.json of a run to repeat."),
]
RankingFiles = Annotated[
    list[Path] | None, typer.Option(help="Compare a ranking from a JSON file; repeatable.")
]
RankOut = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="Also write a file per ranking and the table."),
]
Fresh = Annotated[bool, in_directory("--fresh", help="Measure anew, and replace what is there.")]
Out = Annotated[Path | None, in_directory("--out", metavar="DIR", help="Run directory.")]
TrustCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let a checkpoint run its own code.")
]
Target = Annotated[
    str | None,
    typer.Option(
        metavar="answer_logprob|logit_difference",
        help="What the gradients of grad_act, attribution and integrated_gradients follow: the "
        "log-probability of the tuned model's own most likely token, or its logit minus the "
        "runner-up's. [default: answer_logprob]",
    ),
]
IgSteps = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Points on the path of integrated_gradients at which the gradient is taken. "
        "[default: 8]",
    ),
]

SHARED_OUT: dict[str, Any] = {
    "shard": of_many(metavar="I/N", help="Measure one of N shares; then `rq4lens merge`."),
    "cluster": of_many(metavar="local|auto|ADDRESS", help="Measure on a Ray cluster."),
    "workers": of_many(metavar="N", help="With --cluster: workers; as many as fit."),
    "gpus_per_worker": of_many(metavar="X", help="With --cluster: GPUs of each worker, also 0.5."),
    "divide": of_many(
        metavar="auto|conditions|prompts", help="Pieces of conditions, or of prompts as well."
    ),
}
"""The options of :class:`Many`."""


def takes_many(*names: str) -> Callable[[Callable[..., Any]], Any]:
    """Give a command some options of many processes, all if none is named, as its last parameter.

    It is called with what they ask for, a :class:`Many`.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        *own, last = inspect.signature(command, eval_str=True).parameters.values()
        fields = inspect.signature(Many, eval_str=True).parameters
        asked = [
            fields[name].replace(
                kind=inspect.Parameter.KEYWORD_ONLY,
                annotation=Annotated[fields[name].annotation, SHARED_OUT[name]],
            )
            for name in names or SHARED_OUT
        ]

        def call(*config: Any, **values: Any) -> Any:
            many = Many(**{each.name: values.pop(each.name) for each in asked})
            return command(*config, **values, **{last.name: many})

        return _read_as(command, [*own, *asked], call)

    return decorate


def takes_config(
    *parts: type[Settings] | str,
    without: tuple[str, ...] = (),
    config_file: bool = False,
    default_pair: str | None = None,
) -> Callable[[Callable[..., Any]], Any]:
    """Give a command one option per setting, and call it with the finished :class:`RunConfig`.

    The command's first parameter is the configuration; its other parameters stay options of their
    own. A part of the configuration gives all its settings, a name one. Values are checked by the
    configuration itself, so that the error sentences are the same everywhere.
    """
    names = [
        name
        for part in parts
        for name in ([part] if isinstance(part, str) else part.by_file_key())
        if name not in (*NO_OPTION, *without)
    ]
    names.sort(key=_place)
    first = [name for name in names if name in NEEDED]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        parameters = [_keyword("config", ConfigFile)] if config_file else []
        parameters += [_keyword(name, _option(name)) for name in first]
        parameters += [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
        parameters += [_keyword(name, _option(name)) for name in names if name not in first]

        def call(**values: Any) -> Any:
            settings = {name: values.pop(name) for name in names}
            file = values.pop("config", None)
            return command(_assemble(file, settings, default_pair), **values)

        return _read_as(command, parameters, call)

    return decorate


def _read_as(
    command: Callable[..., Any], parameters: list[inspect.Parameter], call: Callable[..., Any]
) -> Callable[..., Any]:
    """A function by the name and docstring of a command, of which others read these parameters."""
    functools.update_wrapper(call, command)
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {each.name: each.annotation for each in parameters}
    del call.__wrapped__  # type: ignore[attr-defined] # else the original signature would be read
    return call


def _assemble(
    file: Path | None, settings: dict[str, Any], default_pair: str | None = None
) -> RunConfig:
    given = {name: _plain(name, value) for name, value in settings.items() if value is not None}
    if file is not None:
        config = read_config(file)
        start = config.flat()
        if file.suffix == ".json":  # a finished run, which may have moved with what it names
            start |= config.pair.found_from(file.parent).model_dump(
                include={"base", "tuned", "prompts"}, exclude_unset=True
            )
    elif "base" in given and ("tuned" in given or "tuned" not in settings):
        start = {}
    elif (name := given.get("pair", default_pair)) is not None:
        start = preset(name).flat()
    elif "base" in given or "tuned" in given:
        one, other = ("base", "tuned") if "base" in given else ("tuned", "base")
        raise UserError(
            f"--{one} {given[one]!r} is given without --{other}: a pair is both; name the other "
            "model too."
        )
    else:
        raise UserError(
            "no pair is named: give --pair NAME (see `rq4lens pairs`), --base and --tuned, or a "
            "TOML file."
        )
    return config_from({**start, **given}, "the command line" if file is None else str(file))


def _plain(name: str, value: Any) -> Any:
    if not _is_list(name):
        return value
    if get_args(SETTINGS[name].annotation)[0] is str:
        return [part.strip() for part in value.split(",")]
    try:
        return [int(part) for part in value.split(",")]
    except ValueError:
        raise UserError(
            f"--{name.replace('_', '-')} {value!r} is not a list of numbers: write it as '1,2,4'."
        ) from None


def _part(name: str) -> str:
    """The part of the configuration that a setting belongs to."""
    return next(part for part, kind in PARTS.items() if name in kind.by_file_key())


def _place(name: str) -> int:
    """Where the help lists a setting."""
    return NEEDED.index(name) if name in NEEDED else len(NEEDED) + [*PANELS].index(_part(name))


def _keyword(name: str, option: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=option)


def _option(name: str) -> Any:
    said, flag = SETTINGS[name].description or name, f"--{name.replace('_', '-')}"
    text = f"{said[:1].upper()}{said[1:]}.{_default_note(name)}"
    panel = None if name in NEEDED else PANELS[_part(name)]
    how: dict[str, Any] = {"help": text, "rich_help_panel": panel}
    if bool in _kinds(name):
        return Annotated[bool | None, typer.Option(f"{flag}/--no-{flag[2:]}", **how)]
    return Annotated[str | None, typer.Option(flag, metavar=_metavar(name), **how)]


def _default_note(name: str) -> str:
    default = SETTINGS[name].default
    if default in (None, "", ()) or name == "pair":
        return ""
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
    return f" [default: {str(shown).lower() if isinstance(shown, bool) else shown}]"


def _metavar(name: str) -> str:
    kinds = _kinds(name)
    found = [each for kind in kinds for each in get_args(kind) if isinstance(each, str)]
    choices = list(dict.fromkeys(found))
    if any("|" in each for each in choices):  # which a shell would read, too
        return " or ".join(f"'{each}'" for each in choices)
    plain = "LIST" if _is_list(name) else "INT" if int in kinds else "TEXT"
    plain = "FLOAT" if float in kinds else "PATH" if name in PATHS else plain
    return "|".join(choices) or plain


def _is_list(name: str) -> bool:
    return get_origin(SETTINGS[name].annotation) is tuple


def _kinds(name: str) -> tuple[Any, ...]:
    """What a setting may be: its type, or those of a union."""
    annotation = SETTINGS[name].annotation
    return (annotation, *get_args(annotation))
