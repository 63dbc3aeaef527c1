"""Heads to plant in are those that the base model misses, by a rule that sees it alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from games import Game, measured
from tiny import random_prompts, tiny_model, word_tokenizer

from rq4lens.analysis.statistics.plain import to_json
from rq4lens.heads import Head
from rq4lens.models.load.loading import LoadedModel
from rq4lens.patching.patch import Effects
from rq4lens.validation.scenarios import BaseHeads, LayerCost, damages_add, fitted

SILENT, DEAD_LAYER = 3, 2


@pytest.fixture(scope="module")
def model():
    """A model in which one head of each layer, and all of one layer, write nothing."""
    found = tiny_model()
    with torch.no_grad():
        for block in found.blocks:
            block.attn.W_O[SILENT] = 0
        found.blocks[DEAD_LAYER].attn.W_O[:] = 0
    return found


@pytest.fixture(scope="module")
def heads(model):
    return BaseHeads(
        LoadedModel.wrap(model, word_tokenizer()), random_prompts(n_train=40, n_val=12)
    )


def test_the_cost_of_a_head_is_that_of_its_mean(model, heads):
    """As measured by hand, with a hook that writes the mean at the decision token."""
    tokens = heads._pair.tokens("base", "val").token_ids
    rows = [torch.tensor([list(row)]) for row in tokens]
    site = "blocks.1.attn.hook_z"
    with torch.no_grad():
        z = torch.stack([model.run_with_cache(row)[1][site][0, -1] for row in rows])

        def mean_of_head_0(value, hook):  # noqa: ARG001
            value[0, -1, 0] = z[:, 0].mean(0)
            return value

        kl = []
        for row in rows:
            clean = model(row)[0, -1].double().log_softmax(-1)
            patched = model.run_with_hooks(row, fwd_hooks=[(site, mean_of_head_0)])
            patched = patched[0, -1].double().log_softmax(-1)
            kl.append(float((patched.exp() * (patched - clean)).sum()))
    assert heads.cost(1).group_nats[0] == pytest.approx(np.mean(kl), rel=1e-3)


def test_what_does_nothing_is_never_chosen(heads):
    """A layer that writes nothing is no layer to plant in, and a silent head no head."""
    assert heads.layers
    assert DEAD_LAYER not in heads.layers
    for seed in range(20):
        chosen = heads.choose({"rewired": 3}, None, np.random.default_rng(seed))
        assert chosen.layer in heads.layers
        assert SILENT not in [head.index for head in chosen.heads["rewired"]]
        assert all(cost > 0 for cost in chosen.base_cost_nats.values())


def test_all_heads_are_drawn_from_where_nothing_is_asked_of_them(heads):
    """Among all, silent heads and dead layers are drawn like any other."""
    drawn = [heads.choose({"rotated": 3}, None, np.random.default_rng(n), "all") for n in range(40)]
    assert {chosen.layer for chosen in drawn} == set(range(heads.n_layers))
    assert SILENT in {head.index for chosen in drawn for head in chosen.heads["rotated"]}


def test_the_line_is_a_tenth_of_an_even_share():
    """Of four heads in a layer that costs 4 nats, those of at least 0.1 nats matter."""
    cost = LayerCost(0, 4.0, np.array([0.09, 0.1, 3.0, 0.05]))
    assert cost.mattering(at_least=1) == [2, 1]
    assert cost.mattering(at_least=3) == [2, 1, 0]


def test_no_more_is_planted_than_matters():
    """Half of the layer stays as it was; one of each kind is planted at least."""
    assert fitted({"rotated": 3, "rewired": 2}, 16, 16) == {"rotated": 3, "rewired": 2}
    assert fitted({"rotated": 3, "rewired": 2}, 16, 3) == {"rotated": 1, "rewired": 1}
    assert fitted({"rotated": 3}, 4, 4) == {"rotated": 2}


def test_a_choice_is_recorded(heads):
    """What decided is data: the layer, the heads and what each costs the base model."""
    chosen = heads.choose({"rewired": 1}, 1, np.random.default_rng(0))
    (head,) = chosen.heads["rewired"]
    record = to_json(chosen)
    assert record["heads"] == {"rewired": [head.label]}
    assert record["base_cost_nats"] == {head.label: heads.cost(1).group_nats[head.index]}
    assert isinstance(head, Head)


class Pushes(Game):
    """``KL_raw`` is the square of what the patched heads push the output by, together."""

    def effects(self, patches, progress=None):  # noqa: ARG002
        """Effects of patches on the one prompt."""
        raw = (self.masks([patch.heads for patch in patches]) @ self.single) ** 2
        return Effects(raw, raw)


@pytest.mark.parametrize(
    ("pushes", "adds"),
    [
        ([2.0, 1.0], True),
        ([2.0, -1.0], False),
        ([2.0, 0.01], False),
        ([1.0, 1.0, -1.5], False),
        ([1.0, 1.0, 1.0], True),
        ([1.0], True),
    ],
)
def test_damages_add_unless_one_head_undoes_anothers(pushes, adds):
    """Two heads that push apart, or one that hardly pushes, fail; in any company, not in all."""
    game = Pushes(np.array(pushes)[:, None])
    assert damages_add(measured(game), range(len(pushes))) is adds
