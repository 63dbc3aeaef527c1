"""Head-set games with known truth: a stand-in for a measured pair, computed from formulas.

A game gives ``KL_raw(S)`` and ``KL_mapped(S)`` of every head set on every prompt. In an additive
game heads do not interact; a pairwise game adds a bonus for chosen pairs. Swapped into the other
model, a head set closes the gap between the two by its ΔKL. Whatever the analysis says about such
a game can be checked by enumeration or by hand.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from rq4lens.analysis.coverage.table import CoverageInputs
from rq4lens.analysis.effects.measured import MeasuredLayer, MeasuredSets
from rq4lens.analysis.effects.table import full_effect
from rq4lens.analysis.rankings.exact import single_ranking
from rq4lens.analysis.rankings.methods import METHODS
from rq4lens.analysis.statistics.bootstrap import Bootstrap
from rq4lens.config import AnalysisEffort, Effort, Patching
from rq4lens.heads import HeadSet
from rq4lens.patching.measured import Measurer, Planned
from rq4lens.patching.patch import BASE, MAPPED, OTHERS, OWN, SELF, TUNED, Effects
from rq4lens.results import EVERY, EVERY_LAYER, GridResult, GridSettings

GRADIENT_METHODS = tuple(
    name for name, method in METHODS.items() if method.function.startswith("gradients.")
)
"""Methods that need the tuned model itself and no patched measurement."""


class Game:
    """Measures head sets by formula, with the same calls as a real experiment.

    ``single`` and ``raw`` are ``[head prompt]``: the head's own ΔKL and KL_raw on each prompt.
    ``pairs`` is ``[head head]``, symmetric with a zero diagonal: what a pair adds to ΔKL.
    """

    def __init__(self, single, raw=None, pairs=None, groups=None):
        self.single = np.asarray(single, dtype=float)
        self.n_heads, n_prompts = self.single.shape
        self.n_layers = 2
        self.raw = np.asarray(raw, dtype=float) if raw is not None else np.abs(self.single) + 1.0
        self.pairs = np.zeros((self.n_heads,) * 2) if pairs is None else np.asarray(pairs)
        self.prompt_ids = tuple(f"p{i}" for i in range(n_prompts))
        self.groups = tuple(groups) if groups is not None else self.prompt_ids
        self.gap_nats = 2 * (np.abs(self.single).sum(0) + np.abs(self.pairs).sum())
        self.n_measured = 0

    def delta(self, masks: np.ndarray) -> np.ndarray:
        """ΔKL of head sets, given as rows of zeros and ones, on each prompt."""
        bonus = np.einsum("si,ij,sj->s", masks, self.pairs, masks) / 2
        return masks @ self.single + bonus[:, None]

    def masks(self, sets: Sequence[Sequence[int]]) -> np.ndarray:
        """Head sets as rows of zeros and ones."""
        masks = np.zeros((len(sets), self.n_heads))
        for mask, heads in zip(masks, sets, strict=True):
            # Thousands of sets are measured: a set's own indices spare its checks.
            mask[list(getattr(heads, "indices", heads))] = 1
        return masks

    def effects(self, patches, progress=None):  # noqa: ARG002
        """Effects of patches, as an experiment gives them; layer 0 has half the repair."""
        sources = np.array([patch.source for patch in patches])[:, None]
        self.n_measured += int((sources == MAPPED).sum())
        strength = np.array([(patch.alpha / 0.3) ** 2 for patch in patches])[:, None]
        share = np.array([1.0 if patch.layer == 1 else 0.5 for patch in patches])[:, None]
        masks = self.masks([patch.heads for patch in patches])
        own = share * self.delta(masks)
        kl_nats = strength * ((sources != SELF) * (masks @ self.raw) - (sources == MAPPED) * own)
        closed = np.isin(sources, (BASE, TUNED)) * own
        answer_is = np.where(closed < self.gap_nats / 2, float(OWN), float(OTHERS))
        return Effects(kl_nats, -kl_nats, self.gap_nats - closed, answer_is)

    def condition(self, cond, heads, layer=1, source=None):
        """One condition of a grid."""
        planned = Planned(cond, layer, HeadSet.of(heads, self.n_heads), 0.3, source)
        return Measurer(self).conditions([planned])[cond]

    def grid(self, ks=(1, 2), random_seeds=(0, 1, 2), noise_floor_nats=0.0, rank_by="delta"):
        """The main job's grid of this game."""
        heads = range(self.n_heads)
        conditions = [self.condition("full", heads)]
        conditions += [self.condition(f"head{h}", [h]) for h in heads]
        order = np.argsort(-self.single.mean(1), kind="stable")
        for k in ks:
            conditions.append(self.condition(f"top{k}", order[:k].tolist()))
            conditions += [
                self.condition(f"rand{k}_s{s}", random.Random(s).sample(heads, k))
                for s in random_seeds
            ]
        conditions.append(self.condition("ctrl_full", heads, layer=0))
        conditions += [self.condition("none", []), self.condition("self", heads, source=SELF)]
        every = Planned(EVERY, EVERY_LAYER, HeadSet.all(self.n_heads), 1.0)
        return GridResult(
            settings=settings(self.n_heads, ks, random_seeds, rank_by),
            prompt_ids=self.prompt_ids,
            groups=self.groups,
            conditions={condition.cond: condition for condition in conditions},
            noise_floor_nats=noise_floor_nats,
            every_layer=Measurer(self).transfer(every),
        )


def settings(n_heads, ks=(1, 2), random_seeds=(0, 1, 2), rank_by="delta", resamples=10_000):
    return GridSettings(
        pair="game",
        base="base",
        tuned="tuned",
        n_layers=2,
        n_heads=n_heads,
        decision_rule="last",
        dtype="float32",
        engine="formula",
        patching=Patching(
            layer=1,
            control_layer=0,
            k=tuple(ks),
            random_seeds=tuple(random_seeds),
            rank_by=rank_by,
        ),
        effort=Effort(resamples=resamples),
    )


def measured(game: Game, layer=1, alpha=0.3) -> MeasuredSets:
    """Nothing measured yet of a game's main layer."""
    return MeasuredSets.of(game, layer, alpha)


def noisy_game(means, n_prompts, seed=0, noise=0.1, **kwargs) -> Game:
    """An additive game whose heads have the given mean effects and normal noise over prompts."""
    rng = np.random.default_rng(seed)
    single = np.asarray(means, dtype=float)[:, None] + noise * rng.normal(
        size=(len(means), n_prompts)
    )
    return Game(single, **kwargs)


def layer_of(game, ks=(1, 2), n_resamples=300, seed=0, rank_by="delta") -> MeasuredLayer:
    """A game's main layer as the tables of its analysis read it."""
    sets = measured(game)
    bootstrap = Bootstrap(game.groups, n_resamples, seed)
    full = full_effect(sets.delta_nats([sets.everything])[0], 0.0, bootstrap)
    return MeasuredLayer(sets, full, bootstrap, ks, rank_by)


def inputs_of(
    game, ks=(1, 2), random_ks=(), n_random_sets=200, n_splits=3, seed=0, n_resamples=300
):
    """What the coverage table of a game is made from."""
    layer = layer_of(game, ks, n_resamples, seed)
    return CoverageInputs(
        layer=layer,
        ranking=single_ranking(layer.measured, "delta"),
        effort=AnalysisEffort(
            random_ks=tuple(sorted({*ks, *random_ks})),
            n_random_sets=n_random_sets,
            n_splits=n_splits,
        ),
        seed_sets={k: {0: tuple(range(k))} for k in ks},
    )
