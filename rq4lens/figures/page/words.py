"""The words of the report, each explained in one sentence, and questions that readers ask."""

from __future__ import annotations

import re
from pathlib import Path

WORDS = {
    "head": "An attention head; L1H0 is head 0 of layer 1.",
    "patch": "One model is run with activations of the other at some heads, at the token whose "
    "next-token distribution is compared.",
    "base": "The model before the fine-tune.",
    "tuned": "The model after it.",
    "gap": "How far apart base and tuned answer here: KL between their next-token distributions.",
    "nats": "The unit of KL with natural logarithms: 0.7 nats are one bit.",
    "undoes": "to_base: how much of the gap is gone when the tuned model gets base's activations "
    "at these heads, at strength 1. 100%: it answers as base does.",
    "gives base": "to_tuned: how much of the gap is gone when base gets the tuned activations at "
    "these heads, at strength 1. 100%: base answers as the tuned model does.",
    "answers changed": "Share of prompts on which the patch changes the most likely next token.",
    "become base's": "Of the prompts on which base and tuned prefer different tokens, the share on "
    "which the patched tuned model prefers that of base.",
    "constant": "The mean of the tuned head over train prompts: it knows nothing of the prompt.",
    "raw": "Base's own activation.",
    "shifted": "Base's activation, moved by the difference of the two means.",
    "mapped": "What the map, fitted on train prompts, predicts from base's activation.",
    "held out": "A map that was fitted without the content that the prompt is about.",
    "output": "What base's head adds to the residual stream, in place of what the tuned head adds.",
    "recovered": "Of what a head tells about the prompt beyond a constant, how much is there with "
    "this in its place. 100%: all, 0: no more than a constant, below 0: worse than a constant.",
    "damage": "KL of the tuned model with this in place of the head, from the clean tuned model.",
    "damage of a constant": "What the tuned mean in place of the head costs: what there is to "
    "recover.",
    "kind": "What the fine-tune did to a head, decided by what is recovered at strength 1.",
    "idle": "A constant, base's activation and leaving the head out all do next to nothing.",
    "unchanged": "Base's own activation recovers at least 90%.",
    "recoded": "The map recovers at least 50%, also on other contents and neutral prompts: the "
    "same content in other coordinates.",
    "reassigned": "The map recovers at least 50%, but not on other contents, or not on neutral "
    "prompts.",
    "replaced": "The map recovers less than 50%: what base's head says does not stand for it.",
    "undecided": "An interval holds the line, or what would decide was not measured.",
    "stand-in": "Something that knows less than the map and is put in its place.",
    "behind the map": "Damage of the stand-in less that of the map, prompt by prompt.",
    "neutral prompts": "Prompts that have nothing to do with the fine-tune.",
    "noise pair": "Base plus the fine-tune's weight change, shuffled inside each matrix.",
    "multiple": "The real pair's number as a multiple of the noise pair's.",
    "control layer": "Another layer, patched in the same way for comparison.",
    "alpha": "The strength of a patch: 0 keeps the tuned activation, 1 replaces it.",
    "KL_raw": "Damage of base's own activation at the run's strength.",
    "KL_mapped": "Damage of the map's prediction at the run's strength.",
    "ΔKL": "KL_raw less KL_mapped: how much of the raw patch's damage the map repairs.",
    "drop": "ΔKL as a share of KL_raw.",
    "coverage": "ΔKL of some heads as a share of ΔKL of all heads of the layer.",
    "cross-fitted": "Heads chosen on one half of the prompts and scored on the other.",
    "random": "Head sets of the same size, drawn at random.",
    "p": "How often chance alone would do as well; small p-values say that, not how large it is.",
    "k90": "The fewest heads that reach 90% of what all heads do.",
    "Gini of |ΔKL|": "How unevenly effects lie on heads: 0 all equal, near 1 one has everything.",
    "rank": "Place in the ranking; 1 is best.",
    "condition": "A head set that was patched: the best k, all of the layer, the control layer.",
    "95% interval": "[low, high]: where the number lies for more prompts like these.",
}
"""Words as they stand in headings of tables, and what they mean."""


MARKUP = re.compile(r"`|\[(?=[^]]*\]\()|\]\([^)]*\)")


def questions() -> dict[str, str]:
    """The questions of the FAQ and their answers, as plain text."""
    faq = (Path(__file__).parent / "faq.md").read_text(encoding="utf-8")
    parts = re.findall(r"^\*\*(.+?)\*\*\n(.+?)(?=\n\*\*|\Z)", faq, re.MULTILINE | re.DOTALL)
    return {question: MARKUP.sub("", answer).strip() for question, answer in parts}


def meaning(text: str) -> str:
    """What a word means, or nothing; units in brackets do not count."""
    return WORDS.get(text.split(" (", maxsplit=1)[0], "")
