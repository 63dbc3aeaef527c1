"""The reference: native ``hook_z`` patches, one full forward pass per condition.

Slow and simple on purpose. Every faster engine must give the numbers of this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rq4lens.config import Patching, Place
from rq4lens.errors import UserError
from rq4lens.heads import HeadSet
from rq4lens.models.load.lens import HookedModel, HookPoint, z_site
from rq4lens.models.prompts.prompt_set import PaddingSide, TokenBatch, TokenizedPrompts
from rq4lens.patching.activations import capture_z, check_layers, put_log_probs
from rq4lens.patching.passes import forward_batch, precise_dtype
from rq4lens.patching.patch import (
    Effects,
    Intervention,
    OtherModel,
    Patch,
    Progress,
    Sources,
    all_effects,
    answer_effects,
    blend,
    head_outputs,
    n_measures,
)


@contextmanager
def patched_heads(
    model: HookedModel,
    intervention: Intervention,
    sources: Sources,
    batch: TokenBatch,
) -> Iterator[HookedModel]:
    """The model with its heads patched while the context lasts; no hook stays behind.

    :func:`rq4lens.patch` does all of this at once.

    >>> import torch
    >>> from rq4lens.patching.patch import Patch
    >>> batch = experiment.prompts.batch(torch.arange(3))
    >>> patches = (Patch(1, rq.HeadSet.parse("0", n_heads=16), 1.0, "raw"),)
    >>> model = pair.tuned.model
    >>> with rq.patched_heads(model, patches, experiment.sources, batch) as patched:
    ...     patched(batch.tokens).shape[0]
    3

    Args:
        model: the tuned model.
        intervention: the patches, at most one per layer.
        sources: the activations that are blended in, for all prompts.
        batch: the prompts that will be run; they say which of their tokens are patched.

    Yields:
        The model, to be run on ``batch.tokens``.

    Raises:
        UserError: if a source does not have the shape of the site it is patched into.
    """
    written: dict[int, Tensor] = {}
    hooks = [
        (z_site(patch.layer), _patch_hook(patch, sources, batch, written)) for patch in intervention
    ]
    own_W_O = [patch.layer for patch in intervention if patch.source in sources.W_O]
    with model.hooks(fwd_hooks=hooks), added(model, own_W_O, written.get):
        yield model


@contextmanager
def added(
    model: HookedModel, layers: Sequence[int], written: Callable[[int], Tensor | None]
) -> Iterator[None]:
    """Add to what the attention of some layers writes, before any norm, while the context lasts."""
    with ExitStack() as stack:
        for layer in layers:

            def add(_attn: Any, _inputs: Any, out: Any, layer: int = layer) -> Any:
                beside = written(layer)
                if beside is None:
                    return out
                # A bridge's attention returns its pattern as well.
                return (out[0] + beside, *out[1:]) if isinstance(out, tuple) else out + beside

            stack.enter_context(model.blocks[layer].attn.register_forward_hook(add))
        yield


def _patch_hook(
    patch: Patch, sources: Sources, batch: TokenBatch, written: dict[int, Tensor]
) -> Callable[[Tensor, HookPoint], Tensor]:
    places, source = batch.patched, sources[patch.layer, patch.source]
    prompt, spot = places.there.nonzero(as_tuple=True)

    # TransformerLens passes the hook point by its name.
    def write(z: Float[Tensor, "prompt pos head d_head"], hook: HookPoint) -> Tensor:  # noqa: ARG001
        # An engine checks the number of prompts; here only a batch of them is known.
        n_prompts = max(len(source), int(batch.rows.max()) + 1)
        shape = (n_prompts, places.at.shape[1], *z.shape[2:])
        _check_source((patch.layer, patch.source), source, shape)
        here = (prompt.to(z.device), places.at[prompt, spot].to(z.device))
        current, incoming = z[here], source[batch.rows[prompt], spot].to(z)
        z = z.clone()
        mask = torch.tensor(patch.heads.mask, dtype=torch.bool, device=z.device)
        if patch.source in sources.W_O:
            W_O = sources.W_O[patch.source](patch.layer).to(z)
            z[here], out = head_outputs(current, incoming, (mask, patch.alpha), W_O)
            beside = out.new_zeros(*z.shape[:2], out.shape[-1])
            beside[here] = out
            written[patch.layer] = beside
        else:
            z[here] = blend(current, incoming, mask, patch.alpha)
        return z

    return write


class HookEngine:
    """Measures each intervention by a full forward pass of the tuned model.

    The padding side changes no number.
    """

    name = "hooks"

    def __init__(
        self,
        model: HookedModel,
        prompts: TokenizedPrompts,
        settings: Patching | None = None,
        place: Place | None = None,
        *,
        padding_side: PaddingSide = "right",
    ) -> None:
        self.model = model
        self.settings = settings or Patching()
        self.prompts = prompts.placed(self.settings.k_positions)
        self.batch_size = (place or Place()).prompts_per_pass
        self.padding_side: PaddingSide = padding_side
        self.fallback_reason: str | None = None

    @property
    def memory_report(self) -> dict[str, Any]:
        """What memory was asked for and used, for the record of a run."""
        return {"batch_size": self.batch_size}

    def clean_z(self, layer: int) -> Float[Tensor, "prompt position head d_head"]:
        """Clean activations at the patched positions of a layer."""
        return capture_z(
            self.model,
            self.prompts,
            [layer],
            batch_size=self.batch_size,
            padding_side=self.padding_side,
        )[layer]

    @torch.no_grad()
    def clean_log_probs(self) -> Float[Tensor, "prompt answer vocab"]:
        """The clean model's next-token distribution at each compared token; else 0."""
        shape = (len(self.prompts), self.prompts.longest_answer, self.model.cfg.d_vocab_out)
        log_probs = torch.empty(shape, dtype=precise_dtype(self.model))
        for batch in self.prompts.batches(self.batch_size, self.padding_side):
            put_log_probs(log_probs, batch, self._answer_logits(batch))
        return log_probs

    def every_layer(
        self, source: str, sources: Sources, other: OtherModel | None = None
    ) -> Effects:
        """Effect of a source in place of every head of every layer."""
        return self.effects([everywhere(self.model, source)], sources, other=other)

    @torch.no_grad()
    def effects(
        self,
        interventions: Sequence[Intervention],
        sources: Sources,
        progress: Progress | None = None,
        other: OtherModel | None = None,
    ) -> Effects:
        """Effect of each intervention on each prompt, and how far it takes the model to another."""
        shape = (len(self.prompts), self.prompts.n_spots)
        used_sources(interventions, sources, self.model, shape)
        n_answer = self.prompts.longest_answer
        found = np.empty((n_measures(n_answer, other), len(interventions), len(self.prompts)))
        for batch in self.prompts.batches(self.batch_size, self.padding_side):
            there = batch.compared.there
            clean = self._answer_logits(batch).flatten(0, 1)[:, None]
            beside = other and other.of_prompts(batch.rows).by_token(there.shape[1])
            beside = beside and beside.to(clean.device)
            for index, intervention in enumerate(interventions):
                with patched_heads(self.model, intervention, sources, batch):
                    patched = self._answer_logits(batch).flatten(0, 1)[:, None]
                effects = answer_effects(
                    all_effects, patched, clean, there, self.settings.kl_direction, beside
                )
                for measure, values in zip(found, effects, strict=True):
                    measure[index, batch.rows.numpy()] = values[:, 0].cpu()
                if progress is not None:
                    progress(len(batch.rows))
        return Effects.of(found, n_answer)

    def _answer_logits(self, batch: TokenBatch) -> Float[Tensor, "prompt answer vocab"]:
        logits = forward_batch(self.model, batch)
        return logits[torch.arange(len(logits))[:, None], batch.compared.at]


def everywhere(model: HookedModel, source: str) -> Intervention:
    """A source in place of every head of every layer."""
    every = HeadSet.all(model.cfg.n_heads)
    return tuple(Patch(layer, every, 1.0, source) for layer in range(model.cfg.n_layers))


def used_sources(
    interventions: Sequence[Intervention],
    sources: Sources,
    model: HookedModel,
    shape: tuple[int, int],
) -> dict[tuple[int, str], Tensor]:
    """The sources that interventions name, if the model can take both.

    ``shape`` is the number of prompts and of patched positions.
    """
    patches = {patch for intervention in interventions for patch in intervention}
    if patches:
        check_layers([patch.layer for patch in patches], model.cfg.n_layers)
    for patch in patches:
        if patch.heads.n_heads != model.cfg.n_heads:
            raise UserError(
                f"head set {patch.heads} is made for {patch.heads.n_heads} heads, but "
                f"{z_site(patch.layer)} has {model.cfg.n_heads}: parse it with n_heads="
                f"{model.cfg.n_heads}."
            )
    for intervention in interventions:
        layers = [patch.layer for patch in intervention]
        if len(set(layers)) < len(layers):
            raise UserError(
                f"one intervention patches layer {max(layers, key=layers.count)} twice: join its "
                "head sets, or measure the patches one by one."
            )

    keys = {(patch.layer, patch.source) for patch in patches}
    used = {key: sources[key] for key in sorted(keys)}
    for key, source in used.items():
        _check_source(key, source, (*shape, model.cfg.n_heads, model.cfg.d_head))
    return used


def used_writers(
    used: Mapping[tuple[int, str], Tensor], sources: Mapping[tuple[int, str], Tensor]
) -> dict[tuple[int, str], Float[Tensor, "head d_head d_model"]]:
    """The output matrices of those sources that have their own."""
    own = sources.W_O if isinstance(sources, Sources) else {}
    return {(layer, name): own[name](layer) for layer, name in used if name in own}


def _check_source(key: tuple[int, str], source: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a source that does not fit the site it is patched into."""
    if tuple(source.shape) != shape:
        layer, name = key
        raise UserError(
            f"cannot patch source {name!r} into {z_site(layer)}: the site has shape {shape} "
            f"[prompt position head d_head], the source {tuple(source.shape)}; capture it on the "
            "same prompts of a model of this shape."
        )
