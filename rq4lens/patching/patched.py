"""A patched forward pass to look at: a model of the pair while some of its heads are replaced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rq4lens.config import Place
from rq4lens.errors import UserError
from rq4lens.heads import Heads, HeadSet
from rq4lens.models.load.loading import HookedModel
from rq4lens.models.pair import ModelPair
from rq4lens.models.prompts.prompt_set import PromptSet, TokenBatch
from rq4lens.models.prompts.reading import decoded
from rq4lens.patching.activations import PairActivations, check_layers
from rq4lens.patching.engines.hooks import patched_heads
from rq4lens.patching.experiment import Experiment, prepare
from rq4lens.patching.maps.fitting import fit_maps
from rq4lens.patching.passes import device_of, forward_batch
from rq4lens.patching.patch import RAW, Patch, into_side


@dataclass
class PatchedModel:
    """A model under a patch, and the prompts that it is patched for.

    Attributes:
        model: the model, to be run on ``tokens``; its heads are patched while the ``with`` lasts.
        tokenizer: its tokenizer.
        patch: what is patched.
        prompts: the prompts, in the order of the rows of ``tokens``.
        batch: their tokens, padded on the right, and where each is decided.
        is_on: whether the patch is in place.
    """

    model: HookedModel
    tokenizer: PreTrainedTokenizerBase
    patch: Patch
    prompts: PromptSet
    batch: TokenBatch
    is_on: bool = True

    def __repr__(self) -> str:
        patch, n_prompts = self.patch, len(self.prompts)
        return (
            f"<PatchedModel {'' if self.is_on else '(off) '}of layer {patch.layer}, heads "
            f"{patch.heads}: {patch.source} at alpha {patch.alpha:g}, {n_prompts} prompts>"
        )

    @property
    def tokens(self) -> Int[Tensor, "prompt pos"]:
        """The tokens of the prompts up to the decision token, padded on the right."""
        return self.batch.tokens.to(device_of(self.model))

    @property
    def decision(self) -> Int[Tensor, "prompt"]:
        """Index of each prompt's decision token, where the patch is."""
        return self.batch.decision

    @torch.no_grad()
    def logits(self) -> Float[Tensor, "prompt vocab"]:
        """Next-token logits at the decision token, of one forward pass.

        Raises:
            UserError: outside of the ``with``, where nothing is patched any more.
        """
        if not self.is_on:
            raise UserError("the patch is off: call logits() inside of `with rq.patch(...)`.")
        logits = forward_batch(self.model, self.batch)
        return logits[torch.arange(len(logits)), self.decision]

    def to_dataframe(self) -> pd.DataFrame:
        """A row a prompt: its most likely next token, and how likely that is."""
        best = self.logits().double().softmax(-1).max(-1)
        return pd.DataFrame(
            {
                "id": self.prompts.ids,
                "text": self.prompts.texts,
                "answer": [decoded(self.tokenizer, token) for token in best.indices.tolist()],
                "probability": best.values.tolist(),
            }
        )


@contextmanager
def patch(
    of: ModelPair | Experiment,
    layer: int,
    heads: Heads,
    alpha: float = 1.0,
    source: str = RAW,
    *,
    prompts: Sequence[str] | None = None,
) -> Iterator[PatchedModel]:
    """Look at the tuned model while heads of it are replaced; no hook stays behind.

    >>> import rq4lens as rq
    >>> pair = rq.load_pair("etiquette")
    >>> some = pair.prompts.split("val").ids[:3]
    >>> with rq.patch(pair, layer=1, heads="0,2", source="raw", prompts=some) as patched:
    ...     logits = patched.logits()
    ...     _, cache = patched.model.run_with_cache(patched.tokens)
    >>> logits.shape[0], cache["blocks.1.attn.hook_z"].shape[0]
    (3, 3)

    Args:
        of: the pair, whose maps are then fitted for this; or an experiment of :func:`prepare`,
            which has its maps and activations ready, and says which split is patched.
        layer: the patched layer.
        heads: the patched heads, as ``"0,2"``, ``[0, 2]`` or ``"L1H0"``.
        alpha: blend strength, in [0, 1].
        source: what is blended in: ``"raw"`` or ``"base"`` (base z), ``"mapped"`` (base z through
            the map), ``"constant"``, ``"shifted"``, ``"output"``, or ``"self"``; ``"tuned"``
            patches the base model with tuned z.
        prompts: ids of the prompts; every prompt of the val split if left out, all in one forward
            pass: name a few where models are large.

    Yields:
        The model, its tokens and its logits.

    Raises:
        UserError: if a layer, head, source or prompt does not exist, or alpha is outside [0, 1].
    """
    check_layers([layer], of.n_layers)
    if isinstance(of, Experiment):
        experiment = of
    else:  # without the clean pass that only fast engines need
        activations = PairActivations(of)
        maps = fit_maps(of, layer, activations=activations)
        experiment = prepare(of, maps, place=Place(engine="hooks"), activations=activations)
    chosen = Patch(layer, HeadSet.read(heads, experiment.n_heads, layer), alpha, source)
    pair, side = experiment.pair, into_side(chosen)
    every = experiment.ends.prompts(side)
    asked = pair.prompts.split(experiment.split).of_ids(every.ids if prompts is None else prompts)
    places = {name: place for place, name in enumerate(every.ids)}
    batch = every.batch(torch.tensor([places[name] for name in asked.ids]))
    model = pair.use(side).model
    patched = PatchedModel(model, pair.member(side).tokenizer, chosen, asked, batch)
    with patched_heads(model, (chosen,), experiment.sources, batch):
        try:
            yield patched
        finally:
            patched.is_on = False
