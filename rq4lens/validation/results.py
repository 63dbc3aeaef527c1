"""What a validation on planted pairs says, and its trials as they are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scipy.stats import binomtest

from rq4lens.disk.store import NUMERICS_VERSION


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
        return asdict(self)

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
    """Everything that can change what a planted pair says."""

    weights: str
    config: str
    tokenizer: str
    dtype: str
    device: str
    prompts: str
    n_val: int
    """How many of the val prompts the methods see."""
    reading: Mapping[str, Any] | None
    scenario: Mapping[str, Any]
    layers: tuple[int, ...]
    """The layers that heads are planted in, in turn."""
    alpha: float
    drift: float
    """How far every weight moves."""
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
        return asdict(self)


@dataclass(frozen=True)
class Recovery:
    """How well one method finds the planted heads of one scenario.

    Args:
        scenario: the scenario.
        method: the ranking method.
        average_precision: of each planted pair; 1 when the planted heads come first.
        auroc: probability that a planted head is ranked before another one, of each pair.
    """

    scenario: str
    method: str
    average_precision: tuple[float, ...]
    auroc: tuple[float, ...]

    @classmethod
    def of(cls, scenario: str, method: str, scores: Sequence[tuple[float, float]]) -> Recovery:
        """From average precision and AUROC of each planted pair."""
        precisions, aurocs = zip(*scores, strict=True)
        return cls(scenario, method, average_precision=precisions, auroc=aurocs)


@dataclass(frozen=True)
class FalseAlarms:
    """How often the corrected sign-flip test of single heads finds something where nothing is.

    Args:
        n_nulls: how many null experiments were made.
        n_alarms: in how many of them some head was significant.
        level: the promised rate.
        ci95: where the true rate may lie (Clopper and Pearson).
    """

    n_nulls: int
    n_alarms: int
    level: float
    ci95: tuple[float, float]

    @classmethod
    def of(cls, alarms: Sequence[bool], level: float) -> FalseAlarms:
        """From whether each null experiment raised an alarm."""
        found = binomtest(sum(alarms), len(alarms)).proportion_ci(0.95)
        return cls(len(alarms), sum(alarms), level, (float(found.low), float(found.high)))

    @property
    def rate(self) -> float:
        """Share of the null experiments with an alarm."""
        return self.n_alarms / self.n_nulls


@dataclass(frozen=True)
class Validation:
    """What a suite of planted pairs said about the methods.

    Args:
        settings: how the suite was made.
        recoveries: one per scenario and method.
        kinds: how often a head that was changed in some way (``"untouched"`` if in none) was told
            to be of some kind, by scenario, truth and verdict.
        false_alarms: of the significance tests.
        planted: of each planted pair, its scenario, which heads were chosen and why, and the truth.
    """

    settings: Mapping[str, Any]
    recoveries: tuple[Recovery, ...]
    kinds: Mapping[tuple[str, str, str], int]
    false_alarms: FalseAlarms
    planted: tuple[Mapping[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON."""
        return {
            "settings": dict(self.settings),
            "recoveries": [asdict(each) for each in self.recoveries],
            "kinds": [
                {"scenario": scenario, "truth": truth, "verdict": verdict, "n": n}
                for (scenario, truth, verdict), n in sorted(self.kinds.items())
            ],
            "false_alarms": {**asdict(self.false_alarms), "rate": self.false_alarms.rate},
            "planted": [dict(each) for each in self.planted],
        }
