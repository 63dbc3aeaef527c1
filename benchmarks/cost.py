"""What the engines cost: the same work, done in several ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from rq4lens.errors import UserError
from rq4lens.figures import theme

ROW_PX = 34


def engine_cost(record: dict[str, Any]) -> go.Figure:
    """Times of one grid and of every head of every layer, the engine's and other ways'.

    Args:
        record: what ``benchmarks/engine.py`` wrote.
    """
    grid, scan = record["grid"], record["scan"]
    hooks, library = record["hooks_seconds_per_condition"], record["library_seconds_per_condition"]
    plain = "two plain forward passes"
    seconds = {
        plain: record["plain_forwards_seconds"],
        "one grid: rq4lens": grid["seconds"],
        "one grid: native hooks": grid["n_conditions"] * hooks,
        "one grid: TransformerLens patching": grid["n_conditions"] * library,
        "every head: rq4lens": scan["seconds"],
        "every head: native hooks": scan["n_conditions"] * hooks,
    }
    setting = (
        record["case"],
        f"{grid['n_conditions']} and {scan['n_conditions']} conditions",
        "hooks and patching extrapolated from a sample",
        record["hardware"],
        record["date"],
    )
    return cost_bars(seconds, reference=plain, setting=setting)


def cost_bars(seconds: Mapping[str, float], *, reference: str, setting: Sequence[str]) -> go.Figure:
    """Times of several ways to do the same work, on a logarithmic axis.

    Args:
        seconds: time by name, in drawing order; above 0.
        reference: the entry that the others are compared with.
        setting: the parts of the setting line: the work, the hardware, the versions, the date.

    Returns:
        The figure: a bar per entry, each with its ratio to the reference.

    Raises:
        UserError: if the reference is not among the times.
    """
    if reference not in seconds:
        raise UserError(
            f"the reference {reference!r} is not among the times: name one of {', '.join(seconds)}."
        )
    ratios = {name: value / seconds[reference] for name, value in seconds.items()}
    longest = max(len(name) for name in seconds)
    figure = go.Figure(
        go.Bar(
            orientation="h",
            y=[theme.plain(name) for name in seconds],
            x=list(seconds.values()),
            text=[_times(ratio) for ratio in ratios.values()],
            textposition="outside",
            cliponaxis=False,
            marker_color=[theme.GREY if name == reference else theme.BLUE for name in seconds],
            **theme.hover(
                [
                    f"<b>{theme.plain(name)}</b><br>{value:.3g} s"
                    f"<br>{_times(ratios[name])} {theme.plain(reference)}"
                    for name, value in seconds.items()
                ]
            ),
        )
    )
    figure.update_xaxes(type="log", title_text="seconds, logarithmic", dtick=1)
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False, dtick=1)
    height_px = 170 + ROW_PX * max(3, len(seconds))
    return theme.frame(
        figure,
        "Time of the same work",
        (*setting, f"×: times {reference}"),
        theme.Layout(height_px, rows=0, left_px=24 + 6 * longest, right_px=54),
        caption="Shorter is faster; the number is a multiple of the reference.",
    )


STARTUP, OTHERS = "start-up", "other stages"
SHOWN_STAGES = 5
"""Stages with a colour of their own, the longest ones."""


def whole_run(record: dict[str, Any]) -> go.Figure:
    """Where the seconds of whole commands go, a bar a command, beside a plain script.

    Args:
        record: what ``benchmarks/end_to_end.py`` wrote.
    """
    plain = record["plain"]
    bars = {"plain script": plain, **{f"rq4lens, {name}": r for name, r in record["runs"].items()}}
    split = _by_stage({name: _stages(each) for name, each in bars.items()})
    colours = (theme.GREY, *theme.SEQUENCE[:-1])[: len(split)]
    figure = go.Figure(
        [_stage_bars(stage, split, colour) for stage, colour in zip(split, colours, strict=True)]
    )
    longest = max(each["wall_seconds"] for each in bars.values())
    for name, each in bars.items():
        wall = each["wall_seconds"]
        text = f"{'' if each['finished'] else 'above '}{wall:.0f} s, "
        text += _times(wall / plain["wall_seconds"])
        figure.add_annotation(x=wall, y=name, text=text, xanchor="left", showarrow=False)
    figure.update_layout(barmode="stack")
    figure.update_xaxes(title_text="seconds", range=[0, 1.25 * longest])
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False, dtick=1)
    return theme.frame(
        figure,
        "Where the seconds of a whole command go",
        (record["what"], record["hardware"], record["date"], "×: times the plain script"),
        theme.Layout(300 + ROW_PX * len(bars), left_px=24 + 6 * max(map(len, bars))),
        caption="Shorter is faster; each part of a bar is a stage that the command names.",
    )


Split = dict[str, dict[str, float]]
"""Seconds by stage and command, or by command and stage."""


def _stages(run: dict[str, Any]) -> dict[str, float]:
    """Seconds of each stage of a process; what no stage names is start-up, and so are imports."""
    named: dict[str, float] = {}
    for stage, seconds in run["stages_seconds"].items():
        name = "load" if stage.startswith("load") else stage
        if stage != "import":
            named[name] = named.get(name, 0.0) + seconds
    return {STARTUP: max(run["wall_seconds"] - sum(named.values()), 0.0), **named}


def _by_stage(commands: Split) -> Split:
    """The same by stage; the shorter ones together."""
    stages = dict.fromkeys(stage for each in commands.values() for stage in each)
    split = {
        stage: {name: each.get(stage, 0.0) for name, each in commands.items()} for stage in stages
    }
    ranked = sorted(split, key=lambda stage: max(split[stage].values()), reverse=True)
    shown = {STARTUP, *[stage for stage in ranked if stage != STARTUP][:SHOWN_STAGES]}
    rest = {name: sum(split[s][name] for s in stages if s not in shown) for name in commands}
    return {stage: split[stage] for stage in stages if stage in shown} | {OTHERS: rest}


def _stage_bars(stage: str, split: Split, colour: str) -> go.Bar:
    seconds = split[stage]
    return go.Bar(
        orientation="h",
        name=stage,
        y=list(seconds),
        x=list(seconds.values()),
        marker_color=colour,
        **theme.hover(
            [f"<b>{name}</b><br>{stage}: {each:.1f} s" for name, each in seconds.items()]
        ),
    )


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}×" if ratio >= 1000 else f"{ratio:.3g}×"
