"""What cards of 24 heads cost beside one plain pass of each model: ``python benchmarks/cards.py``.

Both models are random, of a Llama's shape. As in a run, the engines have made their clean passes
before; the cards read attention, writes and swaps of the heads on all prompts, and show 12.
``small`` runs anywhere; ``llama-8b`` is for a GPU with 80 GB.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from benchmark_cases import LLAMA_8B, TINY, random_model
from engine import timer
from spread import plain_pass
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rq4lens.analysis.card.card import MOST_CARDS, head_cards
from rq4lens.analysis.card.sides import CardInputs
from rq4lens.config import Place
from rq4lens.heads import Head
from rq4lens.models.load.loading import LoadedModel
from rq4lens.models.pair import SIDES, ModelPair
from rq4lens.patching.engines.choice import make_engine

SMALL = TINY | {
    **{"n_layers": 8, "n_heads": 24, "n_key_value_heads": 8, "d_vocab": 4000},
    **{"d_model": 384, "d_mlp": 1344},
}
CASES = {"small": (SMALL, 32, 48, 6), "llama-8b": (LLAMA_8B, 150, 96, 26)}
"""Shape, prompts, tokens of each, and the layer whose heads have cards."""


def tokenizer(n_words: int) -> PreTrainedTokenizerFast:
    """One token a word."""
    found = Tokenizer(models.WordLevel({f"w{i}": i for i in range(n_words)}, unk_token="w0"))
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=found)


def random_pair(case: str, device: str) -> ModelPair:
    """Two models that share nothing, and prompts of random words."""
    shape, n_prompts, n_tokens, _ = CASES[case]
    draw, words = torch.Generator().manual_seed(0), tokenizer(shape["d_vocab"])
    rows = torch.randint(shape["d_vocab"], (n_prompts, n_tokens), generator=draw).tolist()
    prompts = [
        {"id": f"p{at}", "text": " ".join(f"w{token}" for token in row), "split": "val"}
        for at, row in enumerate(rows)
    ]
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    loaded = [LoadedModel.wrap(random_model(at, device, dtype, shape), words) for at in (1, 2)]
    for at, each in enumerate(loaded):
        vars(each)["fingerprint"] = f"random {at}"  # that of 16 GB of weights takes half a minute
    return ModelPair(*loaded, prompts, name=case)


def measure(case: str, device: str, repeats: int) -> dict[str, Any]:
    """Seconds of a plain pass of each model, and of the cards behind engines that are there."""
    pair, layer = random_pair(case, device), CASES[case][3]
    place = Place(batch_size=32)
    tokens = {side: pair.tokens(side, "val") for side in SIDES}
    engines = {
        side: make_engine(pair.member(side).model, tokens[side], place=place, first_layer=layer)
        for side in SIDES
    }
    heads = [Head(layer, head) for head in range(min(MOST_CARDS, pair.n_heads))]

    def plain() -> None:
        for side in SIDES:
            plain_pass(pair.member(side).model, tokens[side])

    def cards() -> None:
        list(head_cards(CardInputs(pair, place=place, engines=engines), heads))

    seconds = timer(torch.device(device), repeats)
    for work in (plain, cards):
        work()  # the first time loads kernels
    found = {"plain_forwards_seconds": seconds(plain), "cards_seconds": seconds(cards)}
    ratio = found["cards_seconds"] / found["plain_forwards_seconds"]
    return {"case": case, "n_cards": len(heads), **found, "ratio_to_plain_forwards": ratio}


def main() -> None:
    """Print the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", nargs="?", default="small", choices=CASES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    print(json.dumps(measure(asked.case, asked.device, asked.repeats), indent=1))


if __name__ == "__main__":
    main()
