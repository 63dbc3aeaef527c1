"""The one place that knows TransformerLens: which line is installed, and where its models differ.

Up to 3.9 there is ``HookedTransformer``, whose weights are converted. ``TransformerBridge``, which
runs the Hugging Face model itself, is there in 3.9 and all that is left in 4. Both answer to the
same names of hooks, as ``blocks.3.attn.hook_z``. What both lines have is imported from here.
"""

# ruff: noqa: F401 - other modules import these

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import TransformerLensKeyValueCache, TransformerLensKeyValueCacheEntry
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import (
    build_bridge_config_from_hf,
    build_bridge_from_module,
)
from transformer_lens.utilities.activation_functions import SUPPORTED_ACTIVATIONS, apply_softcap
from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES
from transformer_lens.utilities.quantization import quantization_method
from transformers import DynamicCache

from rq4lens.errors import UserError
from rq4lens.models.load.checkpoint import explained

try:
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.components import (
        AbstractAttention,
        Attention,
        GatedMLP,
        GroupedQueryAttention,
        LayerNorm,
        LayerNormPre,
        RMSNorm,
        TransformerBlock,
        Unembed,
    )
    from transformer_lens.pretrained import weight_conversions

    HAS_HOOKED = True
except ImportError:
    HAS_HOOKED = False

    class _Gone:
        """Stands for what this line of TransformerLens no longer has; nothing is one."""

        def __getattr__(self, _name: str) -> type[_Gone]:
            return _Gone

    weight_conversions = _Gone()
    HookedTransformer = HookedTransformerConfig = TransformerBlock = AbstractAttention = _Gone
    Attention = GroupedQueryAttention = GatedMLP = LayerNorm = LayerNormPre = _Gone
    RMSNorm = Unembed = _Gone

Backend = Literal["hooked", "bridge"]

HookedModel: TypeAlias = HookedTransformer | TransformerBridge
"""What can be patched."""

HOOKED: tuple[type[Any], ...] = (HookedTransformer, TransformerBridge)
"""The classes of models that can be patched."""

ModelConfig: TypeAlias = HookedTransformerConfig | TransformerBridgeConfig


def chosen_backend(asked: Backend | None) -> Backend:
    """The kind of model that was asked for, or the one that is the default of the line."""
    if asked == "hooked" and not HAS_HOOKED:
        raise UserError(
            "backend 'hooked' needs a HookedTransformer, which TransformerLens 4 no longer has; "
            "use backend 'bridge', or install transformer-lens 3.9."
        )
    return asked or ("hooked" if HAS_HOOKED else "bridge")


def backend_of(model: HookedModel) -> Backend:
    """Which kind of model it is."""
    return "hooked" if isinstance(model, HookedTransformer) else "bridge"


@torch.no_grad()
def bridge_from(hf_model: Any, architecture: str, tokens: Int[Tensor, "1 _pos"]) -> Any:
    """A plain bridge around a Hugging Face model, whose weights stay what and where they are.

    Its heads must be there to be patched: each layer's z has to pass, in the shape that the
    configuration says.
    """
    with explained(
        f"TransformerLens' bridge cannot run this {architecture}",
        "head patching needs a model all of whose layers have attention heads of one width",
    ):
        # The bridge's own set-up of a tokenizer asks the hub for another one.
        bridge = build_bridge_from_module(hf_model, architecture, hf_config=hf_model.config).eval()
        shapes = _shapes_of_z(bridge, tokens.to(next(hf_model.parameters()).device))
    cfg = bridge.cfg
    if cfg.attention_dir != "causal" or shapes != [(cfg.n_heads, cfg.d_head)] * cfg.n_layers:
        raise UserError(
            f"the heads of this {architecture} cannot be patched: its attention is "
            f"{cfg.attention_dir}, and z has the shapes {sorted(set(shapes))} [head d_head]; use a "
            f"causal language model whose layers all have {cfg.n_heads} heads of {cfg.d_head}."
        )
    return bridge


def _shapes_of_z(bridge: Any, tokens: Tensor) -> list[tuple[int, ...]]:
    seen: dict[int, tuple[int, ...]] = {}
    layers = range(bridge.cfg.n_layers)

    def note(layer: int) -> Any:
        # TransformerLens passes the hook point by its name.
        return lambda z, hook: seen.update({layer: tuple(z.shape[2:])})  # noqa: ARG005

    with bridge.hooks(fwd_hooks=[(z_site(layer), note(layer)) for layer in layers]):
        bridge(tokens)
    return [seen.get(layer, ()) for layer in layers]


def z_site(layer: int) -> str:
    """Name of the hook point of head activations, ``blocks.{layer}.attn.hook_z``."""
    return f"blocks.{layer}.attn.hook_z"


def named_weights(model: HookedModel) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by a name that both kinds of model make readable."""
    for name, parameter in model.named_parameters():
        yield name.replace("._original_component", ""), parameter


@dataclass(frozen=True)
class KeptKeys:
    """Keys and values that one layer computed of some tokens, by prompt.

    ``made_by`` is the cache's own record of the layer, which knows windows and lengths.
    """

    keys: Tensor
    values: Tensor
    made_by: Any

    def rows(self, prompts: slice, n_rows: int) -> KeptKeys:
        """Each of some prompts' keys and values, once per row."""
        keys, values = (
            each[prompts].repeat_interleave(n_rows, dim=0) for each in (self.keys, self.values)
        )
        return KeptKeys(keys, values, self.made_by)


def run_over(
    model: HookedModel, tokens: Int[Tensor, "row pos"], earlier: Sequence[KeptKeys] | None = None
) -> tuple[Float[Tensor, "row pos vocab"], list[KeptKeys]]:
    """Run tokens over keys and values of those before them, and return theirs too.

    All prompts are of one length, so that nothing is padded.
    """
    run = _run_hooked if isinstance(model, HookedTransformer) else _run_bridge
    return run(model, tokens, earlier)


def _run_hooked(
    model: Any, tokens: Tensor, earlier: Sequence[KeptKeys] | None
) -> tuple[Tensor, list[KeptKeys]]:
    cache = TransformerLensKeyValueCache.init_cache(model.cfg, tokens.device, len(tokens))
    every = torch.ones_like(tokens)  # without a mask it would be derived from the tokenizer
    if earlier:
        cache.entries = [
            TransformerLensKeyValueCacheEntry(each.keys, each.values) for each in earlier
        ]
        cache.previous_attention_mask = every[:, :1].expand(-1, earlier[0].keys.shape[1])
    logits = model(tokens, attention_mask=every, past_kv_cache=cache, padding_side="right")
    return logits, [KeptKeys(each.past_keys, each.past_values, None) for each in cache.entries]


def _run_bridge(
    model: Any, tokens: Tensor, earlier: Sequence[KeptKeys] | None
) -> tuple[Tensor, list[KeptKeys]]:
    cache = DynamicCache(config=model.original_model.config)
    if earlier:
        cache.layers = [_with_keys(each.made_by, each.keys, each.values) for each in earlier]
    logits = model(tokens, past_key_values=cache, use_cache=True)
    kept = [KeptKeys(each.keys, each.values, _with_keys(each, None, None)) for each in cache.layers]
    return logits, kept


def _with_keys(layer: Any, keys: Tensor | None, values: Tensor | None) -> Any:
    """A copy of a cache's record of a layer that holds these."""
    layer = copy.copy(layer)
    layer.keys, layer.values = keys, values
    return layer
