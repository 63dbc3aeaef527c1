"""One condition: a head set of one layer, raw and mapped, beside the whole layer.

And what the patch makes the tuned model say: greedy continuations, side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from rich.text import Text
from torch import Tensor

from rq4lens.analysis.card.fragment import token_text
from rq4lens.analysis.effects.table import records
from rq4lens.analysis.records import ConditionRecord
from rq4lens.analysis.statistics.plain import to_json
from rq4lens.config import RunConfig
from rq4lens.disk.files import refuse_no_file, write_json_atomic
from rq4lens.errors import UserError
from rq4lens.heads import HeadSet
from rq4lens.jobs.bench import Bench
from rq4lens.jobs.progress import Stage, silent
from rq4lens.models.pair import SIDES, Side
from rq4lens.models.prompts.prompt_set import TokenizedPrompts
from rq4lens.models.prompts.reading import decoded
from rq4lens.patching.activations import capture_z
from rq4lens.patching.engines.hooks import patched_heads
from rq4lens.patching.experiment import Experiment
from rq4lens.patching.grid import measure_condition
from rq4lens.patching.passes import forward_batch
from rq4lens.patching.patch import MAPPED, RAW, Patch, Sources
from rq4lens.screen.tables import condition_text
from rq4lens.screen.terminal import UNCUT, printable, text_of

VOICES = {
    "base": "base",
    "tuned": "tuned",
    RAW: "tuned, heads from base",
    MAPPED: "tuned, heads from base, mapped",
}
"""Who speaks, and how that is called."""

N_LAST = 24
"""Tokens of a prompt that are shown before what is said."""

N_PROMPTS = 3
"""Prompts that are continued where none are named."""


@dataclass(frozen=True)
class Said:
    """The last tokens of a prompt, and how each voice goes on."""

    prompt: str
    ends: str
    texts: Mapping[str, str]


@dataclass(frozen=True)
class SinglePatch:
    """What one patch did: its record, what the console prints, and how prompts then go on."""

    record: ConditionRecord
    text: str
    said: tuple[Said, ...] = ()


def patch_once(
    config: RunConfig,
    heads: str,
    out: Path | None = None,
    *,
    say: int = 0,
    prompts: Sequence[str] = (),
    stage: Stage = silent,
) -> SinglePatch:
    """Patch one head set, and let the models go on for ``say`` tokens behind some prompts.

    The record is also written to ``out``, if there is one. Without ``prompts`` those go on that
    the raw patch moves most.
    """
    refuse_no_file(out)
    bench = Bench(config.updated(control_layer=None, k=[], random_seeds=[]), stage=stage)
    with bench.clock("load"):
        plan = bench.plan
        chosen = HeadSet.parse(heads, plan.n_heads, plan.layer)
    measurer = bench.measurer(plan.layers)
    with bench.clock("patch"):
        grid = measure_condition(measurer, bench.config.patching, chosen, config.effort)
        record = next(each for each in records(grid) if each.cond == "patch")
    text = condition_text(grid.settings, record)
    said: tuple[Said, ...] = ()
    if say:
        moved = np.argsort(-grid["patch"].kl_raw_nats, kind="stable")[:N_PROMPTS]
        wanted = prompts or [grid.prompt_ids[row] for row in moved]
        patch = Patch(plan.layer, chosen, grid.settings.patching.alpha, RAW)
        with bench.clock("say"):
            said = continuations(measurer.experiment, patch, wanted, say)
        text += said_text(said)
    if out is not None:
        write_json_atomic(out, to_json(record) | ({"said": to_json(said)} if say else {}))
    return SinglePatch(record, text, said)


def continuations(
    experiment: Experiment, patch: Patch, prompts: Sequence[str], n_tokens: int
) -> tuple[Said, ...]:
    """Continue measured prompts by each voice, one most likely token after the other.

    Heads are patched at the decision token and at every new token, with what base's heads hold
    where base reads the same continuation.
    """
    return _Speaker(experiment, patch, prompts).said(n_tokens)


class _Speaker:
    """Both models over the same prompts, which grow token by token."""

    def __init__(self, experiment: Experiment, patch: Patch, prompts: Sequence[str]) -> None:
        self.experiment, self.patch, self.pair = experiment, patch, experiment.pair
        read = {side: self.pair.tokens(side, experiment.split).decided() for side in SIDES}
        places = {each: row for row, each in enumerate(read["tuned"].ids)}
        unknown = [each for each in prompts if each not in places]
        if unknown:
            raise UserError(
                f"prompt {unknown[0][:60]!r} is none of the {len(places)} measured ones: name ids "
                f"of split {experiment.split!r}."
            )
        rows = [places[each] for each in prompts]
        self.tokens = {side: each.some(rows) for side, each in read.items()}

    def _refuse(self, n_tokens: int) -> None:
        """Refuse what cannot be said."""
        pair, n_ctx = self.pair, min(self.pair.member(side).card.n_ctx for side in SIDES)
        longest = max(int(each.lengths.max()) for each in self.tokens.values())
        if longest + n_tokens > n_ctx + 1:
            raise UserError(
                f"{n_tokens} tokens behind a prompt of {longest} are more than the {n_ctx} that "
                "the models read: ask for fewer."
            )
        if not pair.keep_both:
            raise UserError(
                "a patched continuation needs both models at every token, and they are not in "
                "memory together: leave out --say, or use --keep-both."
            )
        if not pair.same_tokenizer:
            raise UserError(
                "base cannot read what tuned says, because their vocabularies differ: leave out "
                "--say."
            )

    def said(self, n_tokens: int) -> tuple[Said, ...]:
        """The continuations, prompt by prompt."""
        self._refuse(n_tokens)
        texts = {voice: self._texts(voice, n_tokens) for voice in VOICES}
        tokens = self.tokens["tuned"]
        tokenizer = self.pair.tuned.tokenizer
        return tuple(
            Said(
                name,
                " ".join(token_text(decoded(tokenizer, each)) for each in read[-N_LAST:]),
                {voice: each[row] for voice, each in texts.items()},
            )
            for row, (name, read) in enumerate(zip(tokens.ids, tokens.token_ids, strict=True))
        )

    @torch.no_grad()
    def _texts(self, voice: str, n_tokens: int) -> list[str]:
        new: list[tuple[int, ...]] = [()] * len(self.tokens["tuned"])
        for _ in range(n_tokens):
            best = self._logits(voice, new).argmax(-1).tolist()
            new = [(*before, token) for before, token in zip(new, best, strict=True)]
        tokenizer = self.pair.tuned.tokenizer
        end = tokenizer.eos_token_id
        return [
            str(tokenizer.decode(whole, clean_up_tokenization_spaces=False))
            for whole in (each[: each.index(end)] if end in each else each for each in new)
        ]

    def _grown(self, side: Side, new: Sequence[tuple[int, ...]]) -> TokenizedPrompts:
        read = self.tokens[side]
        both = zip(read.token_ids, new, strict=True)
        return TokenizedPrompts(read.ids, tuple((*start, *end) for start, end in both))

    def _logits(self, voice: str, new: Sequence[tuple[int, ...]]) -> Float[Tensor, "prompt vocab"]:
        """Logits behind the last token, in the order of the prompts."""
        side: Side = "base" if voice == "base" else "tuned"
        model, prompts = self.pair.use(side).model, self._grown(side, new)
        n_positions = 1 + len(new[0])
        batch = next(prompts.placed(n_positions).batches(len(prompts)))
        if voice in SIDES:
            logits = forward_batch(model, batch)
        else:
            patch = replace(self.patch, source=voice)
            base, layer = self.pair.use("base").model, patch.layer
            z = capture_z(base, self._grown("base", new), [layer], k_positions=n_positions)[layer]
            layer_map = self.experiment.source_maps.get((layer, voice))
            sources = Sources({(layer, voice): z if layer_map is None else layer_map(z)})
            with patched_heads(model, (patch,), sources, batch):
                logits = forward_batch(model, batch)
        here = logits[torch.arange(len(logits)), batch.decision]
        return here[batch.rows.argsort()]


def said_text(said: Sequence[Said]) -> str:
    """Continuations as plain text."""
    lines = []
    for each in said:
        lines.append(f"\n{printable(each.prompt)}: … {printable(each.ends)}")
        for voice, name in VOICES.items():
            lines.append(f"  {name:<32}{printable(each.texts[voice])}")
    return text_of(list(map(Text, lines)), sentences=UNCUT)
