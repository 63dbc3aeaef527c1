"""What a sweep over layers leaves in a directory, written and read back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from rq4lens.errors import UserError
from rq4lens.files import read_json, short_reason, write_bytes_atomic, write_json_atomic
from rq4lens.results import GridResult, GridSettings
from rq4lens.run_directory import LAYERS, grid_of_table, per_prompt_table

LAYERS_PER_PROMPT = "layers_per_prompt.parquet"


@dataclass(frozen=True)
class SavedLayers:
    """A sweep read back.

    Args:
        grids: the grid of each layer.
        comparison: what the analysis says of them.
        choice: which layers are proposed as main and control, and why.
    """

    grids: Mapping[int, GridResult]
    comparison: Mapping[str, Any]
    choice: Mapping[str, Any]


def write_layers(
    directory: Path,
    grids: Mapping[int, GridResult],
    comparison: Mapping[str, Any],
    choice: Mapping[str, Any],
) -> None:
    """Write a sweep.

    Args:
        directory: where.
        grids: the grid of each layer.
        comparison: what the analysis says of them.
        choice: the proposed main and control layer, and why.
    """
    table = pd.concat([per_prompt_table(grid) for grid in grids.values()], ignore_index=True)
    write_bytes_atomic(directory / LAYERS_PER_PROMPT, table.to_parquet(index=False))
    record = {
        "settings": {str(layer): grid.settings.to_dict() for layer, grid in grids.items()},
        "noise_floor_nats": {str(layer): grid.noise_floor_nats for layer, grid in grids.items()},
        "comparison": dict(comparison),
        "choice": dict(choice),
    }
    write_json_atomic(directory / LAYERS, record)


def read_layers(directory: Path) -> SavedLayers | None:
    """Read a sweep back.

    Args:
        directory: where it was written.

    Returns:
        The sweep, or None where there is none.

    Raises:
        UserError: if its files are damaged.
    """
    if not (directory / LAYERS).is_file():
        return None
    record = read_json(directory / LAYERS)
    try:
        table = pd.read_parquet(directory / LAYERS_PER_PROMPT)
        grids = {
            int(layer): grid_of_table(
                GridSettings.from_dict(settings),
                table[table["layer"] == int(layer)],
                noise_floor_nats=float(record["noise_floor_nats"][layer]),
            )
            for layer, settings in record["settings"].items()
        }
        return SavedLayers(grids, record["comparison"], record["choice"])
    except Exception as problem:  # every way in which a file can be damaged ends in one sentence
        raise UserError(
            f"the sweep in {str(directory)!r} is damaged ({type(problem).__name__}: "
            f"{short_reason(problem)}): delete {LAYERS}, or sweep again."
        ) from problem
