"""Command-line options made from the configuration, so that both say the same."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer

from rq4lens.config import SETTINGS, RunConfig, Settings, config_from, preset, read_config
from rq4lens.errors import UserError

NO_OPTION = ("about",)
"""Settings of a file that decide nothing."""

ConfigFile = Annotated[
    Path | None,
    typer.Argument(metavar="[CONFIG]", help="TOML file, or the run.json of a run to repeat."),
]
RankingFiles = Annotated[
    list[Path] | None, typer.Option(help="Compare a ranking from a JSON file; repeatable.")
]
RankOut = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="Also write a file per ranking and the table."),
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

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        parameters = [_keyword("config", ConfigFile)] if config_file else []
        parameters += [_keyword(name, _option(name)) for name in names]
        parameters += [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]

        @functools.wraps(command)
        def wrapper(**values: Any) -> Any:
            settings = {name: values.pop(name) for name in names}
            file = values.pop("config", None)
            return command(_assemble(file, settings, default_pair), **values)

        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {each.name: each.annotation for each in parameters}
        del wrapper.__wrapped__  # else the original signature would be read
        return wrapper

    return decorate


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


def _keyword(name: str, option: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=option)


def _option(name: str) -> Any:
    said, flag = SETTINGS[name].description or name, f"--{name.replace('_', '-')}"
    text = f"{said[:1].upper()}{said[1:]}.{_default_note(name)}"
    if bool in _kinds(name):
        return Annotated[bool | None, typer.Option(f"{flag}/--no-{flag[2:]}", help=text)]
    return Annotated[str | None, typer.Option(flag, help=text, metavar=_metavar(name))]


def _default_note(name: str) -> str:
    default = SETTINGS[name].default
    if default is None or default == "" or name == "pair":
        return ""
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
    return f" [default: {str(shown).lower() if isinstance(shown, bool) else shown}]"


def _metavar(name: str) -> str:
    choices = [each for kind in _kinds(name) for each in get_args(kind) if isinstance(each, str)]
    return "|".join(dict.fromkeys(choices)) or ("LIST" if _is_list(name) else "VALUE")


def _is_list(name: str) -> bool:
    return get_origin(SETTINGS[name].annotation) is tuple


def _kinds(name: str) -> tuple[Any, ...]:
    """What a setting may be: its type, or those of a union."""
    annotation = SETTINGS[name].annotation
    return (annotation, *get_args(annotation))
