"""Is the effect one of many prompts or of a few: the top heads, prompt by prompt."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from rq4lens.analysis.statistics import Bootstrap
from rq4lens.figures import theme
from rq4lens.figures.numbers import ConditionNumbers, numbers_of, shown
from rq4lens.figures.scales import SignedLog
from rq4lens.figures.setting import grid_setting
from rq4lens.results import GridResult

_ROW_PX = 40


def per_prompt(
    grid: GridResult,
    heads: tuple[int, ...] | None = None,
    *,
    top: int = 8,
    bootstrap: Bootstrap | None = None,
    dark: bool = False,
) -> go.Figure:
    """Single-head ``ΔKL`` of every prompt, for the top heads.

    Args:
        grid: the measured grid.
        heads: the heads to show, first at the top; the best ``top`` of the grid's ranking when
            left out.
        top: how many heads to show then.
        bootstrap: the resamples behind the intervals in the hover; made from the grid's prompts
            when left out.
        dark: the dark template.

    Returns:
        The figure: a box and its points per head; hover names head and prompt, and gives the head's
        mean with its 95% interval.
    """
    heads = grid.ranking.top(top) if heads is None else heads
    values = np.concatenate([grid.single(head).delta_nats for head in heads])
    scale = SignedLog.of(values.tolist())
    singles, labels = [grid.single(head) for head in heads], [grid.label(head) for head in heads]
    numbers = numbers_of(grid, singles, labels, bootstrap)
    figure = go.Figure([_box(grid, each, scale) for each in numbers])
    figure.add_vline(x=0, line={"color": theme.GREY, "width": 1})
    figure.update_xaxes(title_text="ΔKL of the head alone, per prompt (nats)", nticks=7)
    notes = ["box: quartiles and median; a point a prompt"]
    if scale is not None:
        places, texts = scale.ticks(float(values.min()), float(values.max()))
        figure.update_xaxes(tickvals=places, ticktext=texts)
        notes.append(f"axis linear below {scale.unit:g} nats, logarithmic above")
    figure.update_yaxes(autorange="reversed", showgrid=False, type="category")
    return theme.frame(
        figure,
        title=f"The best heads of layer {grid.settings.layer}, prompt by prompt",
        setting=grid_setting(grid, *notes),
        height_px=190 + _ROW_PX * max(3, len(heads)),
        rows=0,
        dark=dark,
    )


def _box(grid: GridResult, numbers: ConditionNumbers, scale: SignedLog | None) -> go.Box:
    label, values = numbers.label, numbers.condition.delta_nats
    mean = f"mean of {grid.n_prompts} prompts {shown(numbers.delta, 'nats')}"
    return go.Box(
        name=label,
        orientation="h",
        x=[float(value) if scale is None else scale.place(value) for value in values],
        y=[label] * len(values),
        customdata=[label] * len(values),
        boxpoints="all",
        jitter=0.6,
        pointpos=0,
        hoveron="points",
        line={"color": theme.GREY, "width": 1.2},
        fillcolor="rgba(0,0,0,0)",
        marker={"size": 3.5, "opacity": 0.5, "color": theme.DELTA},
        hovertext=[
            f"<b>{label}</b><br>prompt {theme.plain(prompt)}<br>ΔKL {value:.3g} nats<br>{mean}"
            for prompt, value in zip(grid.prompt_ids, values, strict=True)
        ],
        hovertemplate="%{hovertext}<extra></extra>",
    )
