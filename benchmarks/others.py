"""The ways in which the same numbers are usually computed, timed on a sample of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from benchmark_cases import ALPHA, Case, grid_conditions
from torch import Tensor
from transformer_lens import patching

from rq4lens.config import Place
from rq4lens.models.load.lens import z_site
from rq4lens.patching.engines.hooks import HookEngine
from rq4lens.patching.passes import device_of, forward_batch
from rq4lens.patching.patch import Sources, next_token_effects

Timer = Callable[[Callable[[], object]], float]


def plain_forwards(case: Case, seconds: Timer) -> float:
    """Seconds of the unavoidable input: one clean forward pass of each model over all prompts."""

    @torch.no_grad()
    def both() -> None:
        for model in (case.base, case.tuned):
            for batch in case.prompts.batches(case.batch_size):
                forward_batch(model, batch)

    return seconds(both)


def hooks_per_condition(case: Case, sources: Sources, seconds: Timer, n_sampled: int = 3) -> float:
    """Seconds per condition of one full forward pass through native hooks, batched."""
    engine = HookEngine(case.tuned, case.prompts, place=Place(batch_size=case.batch_size))
    every = grid_conditions(case.layer, case.tuned.cfg.n_heads)
    sample = every[:: len(every) // n_sampled][:n_sampled]
    # The engine runs one more pass, the clean one.
    return seconds(lambda: engine.effects(sample, sources)) / (n_sampled + 1)


def library_per_condition(case: Case, seconds: Timer, n_sampled: int = 2) -> float:
    """Seconds per head of TransformerLens' own ``get_act_patch_attn_head_out_by_pos``."""
    batch = next(case.prompts.batches(case.batch_size))
    tokens = batch.tokens.to(case.device)
    heads = [(case.layer, tokens.shape[1] - 1, head) for head in range(n_sampled)]
    index = pd.DataFrame(heads, columns=["layer", "pos", "head"])
    site = z_site(case.layer)
    with torch.no_grad():
        _, cache = case.base.run_with_cache(tokens, names_filter=site)
        clean = forward_batch(case.tuned, batch)[:, -1]

        def divergence(logits: Tensor) -> Tensor:
            return next_token_effects(logits[:, -1], clean)[0].mean()

        def run() -> None:
            patching.get_act_patch_attn_head_out_by_pos(
                case.tuned, tokens, cache, divergence, index_axis_names=None, index_df=index
            )

        return seconds(run) / n_sampled * (len(case.prompts) / len(tokens))


def attribution_of_one_layer(case: Case, seconds: Timer, batch_size: int = 30) -> float:
    """Seconds of gradient attribution patching of all heads of the main layer (approximate)."""
    frozen = [weight for weight in case.tuned.parameters() if weight.requires_grad]
    for weight in frozen:
        weight.requires_grad_(False)

    def run() -> None:
        for batch in case.prompts.batches(min(batch_size, case.batch_size)):
            leaf: list[Tensor] = []

            def start(z: Tensor, hook: object, leaf: list[Tensor] = leaf) -> Tensor:  # noqa: ARG001
                leaf.append(z.detach().requires_grad_(True))
                return leaf[0]

            with case.tuned.hooks(fwd_hooks=[(z_site(case.layer), start)]):
                logits = forward_batch(case.tuned, batch)[
                    torch.arange(len(batch.rows)), batch.decision
                ]
            logits.float().log_softmax(-1).amax(-1).sum().backward()
            assert leaf[0].grad is not None

    try:
        with torch.enable_grad():
            return seconds(run)
    finally:
        for weight in frozen:
            weight.requires_grad_(True)


def process_per_condition(case: str, device: str, dtype: str, seconds: Timer) -> float:
    """Seconds of one condition in a process of its own, which loads both models for it.

    Random pairs are not on disk: their process makes the weights where they will be used, which
    costs less than reading them.
    """
    if case == "builtin":
        command = ["-m", "rq4lens", "patch", "--pair", "etiquette", "--heads", "3"]
        command += [
            "--alpha",
            str(ALPHA),
            "--engine",
            "hooks",
            "--device",
            device,
            "--dtype",
            dtype,
        ]
    else:
        script = str(Path(__file__).with_name("one_condition.py"))
        command = [script, case, "--device", device, "--dtype", dtype]
    return seconds(
        lambda: subprocess.run([sys.executable, *command], check=True, capture_output=True)
    )


def peak_flops(case: Case, seconds: Timer) -> float:
    """Floating point operations per second of one large matrix product in the models' dtype."""
    side = 8192 if case.device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=case.device).to(case.tuned.cfg.dtype) for _ in range(2))
    a @ b
    n_repeats = 10
    return 2 * side**3 * n_repeats / seconds(lambda: [a @ b for _ in range(n_repeats)])


def device_name(case: Case) -> str:
    """The hardware, as it names itself."""
    if device_of(case.tuned).type == "cuda":
        return torch.cuda.get_device_name()
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    names = {line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")}
    return f"{', '.join(sorted(names)) or 'CPU'}, {torch.get_num_threads()} threads"
