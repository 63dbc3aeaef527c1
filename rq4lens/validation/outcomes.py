"""What single planted pairs of a validation said, kept by the content of what made them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rq4lens.store import NUMERICS_VERSION


@dataclass(frozen=True)
class Outcome:
    """What one planted pair said.

    Args:
        recoveries: average precision and AUROC of each method.
        kinds: scenario, truth and verdict of each head.
        alarms: of each null experiment, whether some head was significant.
        planted: the scenario, which heads were chosen and why, and the truth.
    """

    recoveries: tuple[tuple[float, float], ...]
    kinds: tuple[tuple[str, str, str], ...]
    alarms: tuple[bool, ...]
    planted: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The outcome as JSON values."""
        return {name: _plain(values) for name, values in vars(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Outcome:
        """An outcome read back."""
        return cls(
            tuple((float(precision), float(auroc)) for precision, auroc in values["recoveries"]),
            tuple((str(a), str(b), str(c)) for a, b, c in values["kinds"]),
            tuple(map(bool, values["alarms"])),
            dict(values["planted"]),
        )


@dataclass(frozen=True, kw_only=True)
class PlantedIngredients:
    """Everything that can change what a planted pair says.

    Attributes:
        weights: fingerprint of the base model's weights.
        config: fingerprint of its configuration.
        tokenizer: fingerprint of its tokenizer.
        dtype: number format of the model.
        device: kind of device; they round differently.
        prompts: fingerprint of the prompts that are used.
        n_val: how many of the val prompts the methods see.
        reading: how they are read.
        scenario: what is planted.
        layers: the layers that heads are planted in, in turn.
        alpha: blend strength.
        drift: how far every weight moves.
        strength: size of the planted changes.
        seed: seed of the validation.
        number: number of the pair in its scenario.
        methods: the methods that are judged.
        libraries: versions of the libraries that do the arithmetic.
        numerics_version: version of this package's own arithmetic.
    """

    weights: str
    config: str
    tokenizer: str
    dtype: str
    device: str
    prompts: str
    n_val: int
    reading: Mapping[str, Any] | None
    scenario: Mapping[str, Any]
    layers: tuple[int, ...]
    alpha: float
    drift: float
    strength: float
    seed: int
    number: int
    methods: tuple[str, ...]
    libraries: str
    numerics_version: str = NUMERICS_VERSION

    @property
    def label(self) -> str:
        """Scenario and number of the pair."""
        return f"{self.scenario['name']}_{self.number}"

    def to_dict(self) -> dict[str, Any]:
        """Every ingredient by name."""
        values: dict[str, Any] = _plain(asdict(self))
        return values


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, tuple | list) else value
