"""The parts of a block before and after its attention pattern, for rows at the decision token.

Norms and the MLP are the model's own submodules; only the order of the calls, which TransformerLens
keeps inside ``forward``, is repeated here.

Source: the call order of ``TransformerBlock.forward`` in TransformerLens 3.9.
"""

from __future__ import annotations

from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from transformer_lens.components import TransformerBlock
from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES


def is_post_norm(block: TransformerBlock) -> bool:
    """Whether the block normalises what its sublayers return instead of what they read."""
    return block.cfg.original_architecture in POST_NORM_ARCHITECTURES


def attention_input(block: TransformerBlock, resid: Tensor) -> Tensor:
    """What the attention reads from the residual stream."""
    return resid if is_post_norm(block) else block.ln1(resid)


def project_out(
    block: TransformerBlock, z: Float[Tensor, "prompt condition position head d_head"]
) -> Float[Tensor, "prompt condition position d_model"]:
    """``W_O`` and its bias; TransformerLens has no submodule of its own for this product."""
    W_O = rearrange(block.attn.W_O, "head d_head d_model -> d_model (head d_head)")
    return functional.linear(z.flatten(-2).to(W_O.dtype), W_O, block.attn.b_O)


def finish_block(
    block: TransformerBlock,
    resid_pre: Float[Tensor, "prompt condition position d_model"],
    z: Float[Tensor, "prompt condition position head d_head"],
) -> Float[Tensor, "prompt condition position d_model"]:
    """Everything in a block that comes after ``z``."""
    shape = resid_pre.shape
    resid_pre, attn_out = resid_pre.flatten(1, 2), project_out(block, z).flatten(1, 2)
    if block.cfg.use_normalization_before_and_after:
        attn_out = block.ln1_post(attn_out)
    if is_post_norm(block):
        attn_out = block.ln1(attn_out)
    resid_mid = attn_out.add_(resid_pre)
    if block.cfg.parallel_attn_mlp:
        resid_mid = resid_mid.add_(block.apply_mlp(block.ln2(resid_pre)))
    elif not block.cfg.attn_only:
        mlp_in = resid_mid if is_post_norm(block) else block.ln2(resid_mid)
        resid_mid = block.apply_mlp(mlp_in).add_(resid_mid)
    return resid_mid.reshape(shape)
