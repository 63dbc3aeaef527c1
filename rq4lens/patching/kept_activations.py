"""Activations that were captured before, found by the content of what they were captured from."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save
from torch import Tensor

from rq4lens.disk.files import (
    make_directory,
    read_regular_bytes,
    set_aside,
    short_reason,
    write_bytes_atomic,
)
from rq4lens.disk.store import NUMERICS_VERSION, Store

log = logging.getLogger(__name__)

Z = "z"


@dataclass(frozen=True, kw_only=True)
class ActivationIngredients:
    """Everything that can change activations of one layer. Batch size and padding change none.

    Attributes:
        weights: fingerprint of the model's weights.
        config: fingerprint of its configuration.
        tokens: fingerprint of the tokens that it reads, cut at the decision token.
        layer: the layer.
        k_positions: how many positions are kept, the decision token last.
        dtype: number format of the model.
        device: kind of device; they round differently.
        libraries: versions of the libraries that do the arithmetic.
        numerics_version: version of this package's own arithmetic.
    """

    weights: str
    config: str
    tokens: str
    layer: int
    k_positions: int
    dtype: str
    device: str
    libraries: str
    numerics_version: str = NUMERICS_VERSION

    @property
    def label(self) -> str:
        """A readable start of the file name."""
        return f"z_L{self.layer}"

    def to_dict(self) -> dict[str, Any]:
        """Every ingredient by name."""
        return asdict(self)


class KeptActivations:
    """A folder of activations, each with a record that says what made them and their checksum.

    Args:
        directory: the folder; made when something is first kept.
        device: kind of device that the models run on, such as ``"cuda"``.
        fresh: do not use what is there; new activations replace it.
    """

    def __init__(self, directory: Path, device: str, *, fresh: bool = False) -> None:
        self.directory = directory
        self.device = device
        self.fresh = fresh

    def get(
        self, ingredients: ActivationIngredients
    ) -> Float[Tensor, "prompt position head d_head"] | None:
        """The activations, if there are any that can be believed; damaged ones are set aside."""
        if self.fresh or not self.directory.is_dir():
            return None
        store = Store(self.directory)
        record = store.get(ingredients)
        if record is None:
            return None
        path = store.path(ingredients).with_suffix(".safetensors")
        try:
            data = read_regular_bytes(path)
            if hashlib.sha256(data).hexdigest() != record["sha256"]:
                raise ValueError("the checksum does not match")
            return safetensors_load(data)[Z]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as problem:
            log.warning("set aside %s and capturing again: %s", path.name, short_reason(problem))
            set_aside(path)
            return None

    def put(
        self, ingredients: ActivationIngredients, z: Float[Tensor, "prompt position head d_head"]
    ) -> None:
        """Keep activations.

        Raises:
            UserError: if they cannot be written.
        """
        store = Store(self.directory)
        data = safetensors_save({Z: z.contiguous()})
        make_directory(self.directory)
        # The record comes last: whoever finds it finds complete activations.
        write_bytes_atomic(store.path(ingredients).with_suffix(".safetensors"), data)
        store.put(ingredients, {"sha256": hashlib.sha256(data).hexdigest()})
