"""What the cached engine saves on a TransformerBridge: ``python benchmarks/bridge.py``.

GPT-2 small's shape with random weights, 64-token prompts, every head of the middle layer from two
sources at two strengths: through the bridge's key-value cache, its clean pass included, and through
native hooks, a sample of them, extrapolated. Processor time is taken, which a busy machine changes
less than the time on the wall.
"""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from importlib.metadata import version

import torch
from benchmark_cases import command_line
from engine import RESULTS
from transformers import AutoModelForCausalLM, GPT2Config

from rq4lens.heads import HeadSet
from rq4lens.models.load.lens import bridge_from
from rq4lens.models.prompts.prompt_set import TokenizedPrompts
from rq4lens.patching.engines.cached import CachedEngine
from rq4lens.patching.engines.hooks import HookEngine
from rq4lens.patching.patch import Patch, Sources

N_PROMPTS, N_TOKENS, LAYER, SAMPLE = 8, 64, 6, 3


def main() -> None:
    """Time both in one process and keep the record."""
    torch.manual_seed(0)
    config = GPT2Config()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    bridge = bridge_from(model, "GPT2LMHeadModel", torch.arange(4)[None])
    tokens = torch.randint(config.vocab_size, (N_PROMPTS, N_TOKENS)).tolist()
    prompts = TokenizedPrompts(tuple(f"p{i}" for i in range(N_PROMPTS)), tuple(map(tuple, tokens)))
    n_heads = config.n_head
    patches = [
        (Patch(LAYER, HeadSet.of([head], n_heads), alpha, source),)
        for source in ("raw", "mapped")
        for alpha in (1.0, 0.3)
        for head in range(n_heads)
    ]
    shape = (N_PROMPTS, 1, n_heads, config.n_embd // n_heads)
    sources = Sources({(LAYER, name): torch.randn(shape) for name in ("raw", "mapped")})
    engine, reference = CachedEngine(bridge, prompts), HookEngine(bridge, prompts)
    started = time.process_time()
    fast = engine.effects(patches, sources).kl_nats
    middle = time.process_time()
    slow = reference.effects(patches[:SAMPLE], sources).kl_nats
    # The reference runs the clean pass as well, once.
    hooks = (time.process_time() - middle) * (len(patches) + 1) / (SAMPLE + 1)
    seconds = {"cached": middle - started, "hooks": hooks}
    record = {
        "case": "bridge-gpt2-small",
        "what": f"TransformerBridge of GPT-2 small's shape with random weights, {N_PROMPTS} "
        f"prompts x {N_TOKENS} tokens, {len(patches)} conditions at layer {LAYER}",
        "seconds": seconds,
        "times_faster": hooks / seconds["cached"],
        "largest_kl_nats": float(slow.max()),
        "largest_kl_difference_nats": float(abs(fast[:SAMPLE] - slow).max()),
        "command": command_line(),
        "hardware": f"CPU, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("torch", "transformer-lens")},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    (RESULTS / f"{record['case']}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
