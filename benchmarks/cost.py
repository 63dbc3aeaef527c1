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


STARTUP = "start-up and the rest"


def whole_run(record: dict[str, Any]) -> go.Figure:
    """Where the seconds of whole commands go, a bar a command, beside a plain script.

    Args:
        record: what ``benchmarks/end_to_end.py`` wrote.
    """
    plain = record["plain"]
    bars = {"a plain script that loads both models": plain, **record["runs"]}
    split = {name: _stages(each) for name, each in bars.items()}
    stages = dict.fromkeys(stage for each in split.values() for stage in each)
    colours = [theme.GREY, *(theme.SEQUENCE[:-1] * 3)]
    figure = go.Figure(
        [
            go.Bar(
                orientation="h",
                name=stage,
                y=list(bars),
                x=[each.get(stage) for each in split.values()],
                marker_color=colour,
                **theme.hover(
                    [
                        f"<b>{name}</b><br>{stage}: {each.get(stage, 0):.1f} s"
                        for name, each in split.items()
                    ]
                ),
            )
            for stage, colour in zip(stages, colours, strict=False)
        ]
    )
    for name, each in bars.items():
        wall, ratio = each["wall_seconds"], each["wall_seconds"] / plain["wall_seconds"]
        more = "" if each["finished"] else "above "
        figure.add_annotation(
            x=wall,
            y=name,
            text=f"{more}{wall:.0f} s, {_times(ratio)}",
            xanchor="left",
            showarrow=False,
        )
    figure.update_layout(barmode="stack")
    figure.update_xaxes(
        title_text="seconds", range=[0, 1.2 * max(e["wall_seconds"] for e in bars.values())]
    )
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False, dtick=1)
    return theme.frame(
        figure,
        "Where the seconds of a whole command go",
        (record["what"], record["hardware"], record["date"], "×: times the plain script"),
        theme.Layout(
            170 + ROW_PX * (len(bars) + 3), left_px=24 + 6 * max(map(len, bars)), right_px=54
        ),
        caption="Shorter is faster; each part of a bar is a stage that the command names.",
    )


def _stages(run: dict[str, Any]) -> dict[str, float]:
    """Seconds of each stage of a process; what no stage names comes first."""
    named = {name: seconds for name, seconds in run["stages_seconds"].items() if seconds >= 0.05}
    return {STARTUP: max(run["wall_seconds"] - sum(named.values()), 0.0), **named}


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}×" if ratio >= 1000 else f"{ratio:.3g}×"
