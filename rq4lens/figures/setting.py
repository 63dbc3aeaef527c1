"""The line under each figure that says how its numbers were made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rq4lens.results import GridResult, GridSettings


def setting_parts(
    settings: GridSettings,
    n_prompts: int,
    *,
    where: str | None = None,
    alpha: str | None = None,
    notes: Sequence[str] = (),
) -> tuple[str, ...]:
    """Everything a reader needs to know about how the numbers came about.

    Args:
        settings: how the grid was made.
        n_prompts: number of measured prompts.
        where: the layers shown, when they are not the grid's main layer.
        alpha: the blend strengths shown, when they are not the grid's own.
        notes: what this one figure adds, for instance how its intervals were made.

    Returns:
        The parts of the setting line, in order.
    """
    baseline = settings.raw_baseline
    return (
        settings.pair,
        where or f"layer {settings.layer} of {settings.n_layers}",
        f"α = {alpha or format(settings.alpha, 'g')}",
        f"{settings.split}, n = {n_prompts}",
        f"map {settings.map_kind} per {settings.map_scope}",
        f"KL({settings.kl_direction.replace('||', ' ‖ ')}) in nats",
        settings.dtype.removeprefix("torch."),
        *((f"raw baseline {baseline}",) if baseline != "identity" else ()),
        *((f"last {settings.k_positions} positions",) if settings.k_positions != 1 else ()),
        *notes,
    )


def grid_setting(grid: GridResult, *notes: str, alpha: str | None = None) -> tuple[str, ...]:
    """The setting of one grid at its main layer.

    Args:
        grid: the grid.
        notes: what this one figure adds.
        alpha: the blend strengths shown, when they are not the grid's own.
    """
    return setting_parts(grid.settings, grid.n_prompts, alpha=alpha, notes=notes)


def any_grid(grids: Mapping[int, GridResult]) -> GridResult:
    """One of the grids of a sweep; they share everything but the layer."""
    return grids[min(grids)]


def layers_setting(grids: Mapping[int, GridResult], *notes: str) -> tuple[str, ...]:
    """The setting of several layers.

    Args:
        grids: the grid of each layer.
        notes: what this one figure adds.
    """
    grid, layers = any_grid(grids), sorted(grids)
    whole = layers == list(range(layers[0], layers[-1] + 1))
    named = (
        f"{layers[0]} to {layers[-1]}" if whole and len(layers) > 1 else ", ".join(map(str, layers))
    )
    where = f"layers {named} of {grid.settings.n_layers}"
    return setting_parts(grid.settings, grid.n_prompts, where=where, notes=notes)
