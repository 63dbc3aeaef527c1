"""The position map of a run: its heads patched at one token at a time."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rq4lens.analysis.card.sides import models_of
from rq4lens.analysis.positions import SUBJECT, MappedPosition, PositionMap
from rq4lens.analysis.saved import Run, read_run, write_positions
from rq4lens.config import Place
from rq4lens.disk.run import CONDITIONS, REPORT
from rq4lens.disk.store import Store
from rq4lens.errors import UserError
from rq4lens.jobs.pages import write_report_of
from rq4lens.jobs.progress import Stage, silent
from rq4lens.models.pair import SIDES, ModelPair
from rq4lens.models.prompts.prompt_set import FIT_SPLIT, PromptSet
from rq4lens.models.prompts.reading import decoded, tokenize
from rq4lens.patching.activations import PairActivations
from rq4lens.patching.experiment import prepare
from rq4lens.patching.grid import GridPlan, measure_grid
from rq4lens.patching.maps.fitting import fit_maps
from rq4lens.patching.measured import Measurer
from rq4lens.patching.patch import Progress
from rq4lens.results import GridResult

log = logging.getLogger(__name__)

LAST = 8
"""So many of the last tokens are mapped unless others are asked for."""

Asked = int | str
"""A number of tokens, or ``"all"``."""


@dataclass(frozen=True)
class _Mapped:
    """What is mapped: a pair, as its grid was measured, and where measured patches lie."""

    pair: ModelPair
    grid: GridResult
    place: Place
    store: Store | None

    @property
    def split(self) -> str:
        """The split of the measured prompts."""
        return self.grid.settings.patching.split

    @property
    def plan(self) -> GridPlan:
        """The whole layer and every head, at each position."""
        patching = self.grid.settings.patching.of_divergence
        alone = patching.but(control_layer=None, k=(), random_seeds=(), k_positions=1)
        return GridPlan(self.pair.n_heads, alone)


def position_map(
    run: Run | GridResult | Path | str,
    positions: Asked = LAST,
    prompts: Sequence[str] | None = None,
    *,
    pair: ModelPair | None = None,
    trust_remote_code: bool = False,
    stage: Stage = silent,
) -> PositionMap:
    """Patch the heads of a run's layer at one token of each prompt at a time.

    At every position the maps are fitted on the train prompts that have it, and the whole layer and
    each head are measured raw and mapped at the run's alpha, and in both directions of transfer.
    The cost is that of the run's single heads, times the positions.

    >>> rq.position_map(run, 2, run.prompt_ids[:4], pair=pair)
    <PositionMap of etiquette, layer 1, at -2, -1>

    Args:
        run: a finished run, its directory, or a grid.
        positions: how many of the last tokens, the decision token among them, or ``"all"``; as many
            as every measured prompt has. Where prompts name a subject, it is one more position.
        prompts: ids of the measured prompts; all of the run's when left out.
        pair: the models of a grid, or of a run whose models are in memory; a run's are loaded again
            when left out.
        trust_remote_code: let a checkpoint run its own code.
        stage: opens a stage of the work, for progress bars.

    Returns:
        The map.

    Raises:
        UserError: if there is no such number of positions, prompt, run or pair.
    """
    whole = isinstance(positions, int) and not isinstance(positions, bool)
    if positions != "all" and not (whole and int(positions) >= 1):
        raise UserError(
            f"positions {positions!r} is no number of tokens: give how many of the last ones are "
            "patched, one at a time, such as 8, or all."
        )
    with stage("load", None):
        mapped = _mapped(run, pair, trust_remote_code)
        measured = mapped.pair.prompts.split(mapped.split)
        if prompts is not None:
            measured = measured.of_ids(prompts)
        train = mapped.pair.prompts.split(FIT_SPLIT)
        by_id = {each.id: each for each in (*train, *measured)}
        chosen = replace(measured, prompts=tuple(by_id.values()))
        pairs = _pair_of_each_role(mapped, chosen, positions)
    n_prompts = len(next(iter(pairs.values())).prompts.split(mapped.split))
    with stage("positions", len(pairs) * mapped.plan.n_patches * n_prompts) as progress:
        found = [_at(mapped, role, each, progress) for role, each in pairs.items()]
    return PositionMap(tuple(found))


def map_run(
    directory: Path,
    positions: Asked = LAST,
    prompts: Sequence[str] | None = None,
    *,
    trust_remote_code: bool = False,
    stage: Stage = silent,
) -> PositionMap:
    """Measure the position map of a finished run, and write it and the report beside it."""
    found = position_map(
        directory, positions, prompts, trust_remote_code=trust_remote_code, stage=stage
    )
    write_positions(directory, found)
    if (directory / REPORT).is_file():
        write_report_of(directory)
    return found


def _mapped(
    run: Run | GridResult | Path | str, pair: ModelPair | None, trust_remote_code: bool
) -> _Mapped:
    run = read_run(run) if isinstance(run, str | Path) else run
    grid = run.grid if isinstance(run, Run) else run
    place, store = Place(), None
    if isinstance(run, Run):
        store = Store(run.directory / CONDITIONS)
        if pair is None:
            pair, place = models_of(run, trust_remote_code=trust_remote_code)
    if pair is None:
        raise UserError("a grid does not hold its models: give them with pair=....")
    split = grid.settings.patching.split
    missing = set(grid.prompt_ids) ^ set(pair.prompts.split(split).ids)
    if missing:
        raise UserError(
            f"the pair and what was measured have other prompts, {sorted(missing)[0]!r} for one: "
            "give the pair that was measured."
        )
    return _Mapped(pair, grid, place, store)


def _pair_of_each_role(mapped: _Mapped, prompts: PromptSet, asked: Asked) -> dict[str, ModelPair]:
    """The pair read at each position, on the prompts that have it."""
    pair, split = mapped.pair, mapped.split
    n_tokens = _n_tokens(pair, prompts)
    most = min(n_tokens[each] for each in prompts.split(split).ids)
    most = min(most, max(n_tokens[each] for each in prompts.split(FIT_SPLIT).ids))
    last = range(most if asked == "all" else min(most, int(asked)), 0, -1)
    having = {
        f"-{at}": prompts.without([name for name, n in n_tokens.items() if n < at]) for at in last
    }
    subject = _with_subject(pair, prompts, split)
    if subject is not None:
        having = {SUBJECT: subject, **having}
    found = {role: _read_at(pair, role, each) for role, each in having.items()}
    # Some may be left out because the models do not read them alike at one of the positions.
    alike = set.intersection(*(set(each.prompts.split(split).ids) for each in found.values()))
    lost = set(prompts.split(split).ids) - alike
    if not lost:
        return found
    return {role: _read_at(pair, role, each.prompts.without(lost)) for role, each in found.items()}


def _n_tokens(pair: ModelPair, prompts: PromptSet) -> Mapping[str, int]:
    """How many tokens of each prompt can be patched in both models."""
    every = pair.reading.but(positions="all")
    read = [tokenize(prompts, pair.member(side).tokenizer, every).spots for side in SIDES]
    counts = (min(map(len, spots)) for spots in zip(*read, strict=True))
    return dict(zip(prompts.ids, counts, strict=True))


def _with_subject(pair: ModelPair, prompts: PromptSet, split: str) -> PromptSet | None:
    """The prompts that name a subject; None where a measured one names none, or it is not read."""
    without = [prompt.id for prompt in prompts if prompt.subject is None]
    named = prompts.without(without)
    if set(without) & set(prompts.split(split).ids) or FIT_SPLIT not in named.splits:
        return None
    try:
        _read_at(pair, SUBJECT, named).tokens("tuned", split)
    except UserError as problem:
        log.warning("the subject is left out of the position map: %s", problem)
        return None
    return named


def _read_at(pair: ModelPair, role: str, prompts: PromptSet) -> ModelPair:
    """The same models, with one token of each prompt to be patched, or its subject."""
    reading = pair.reading.but(positions=role if role == SUBJECT else f"{role}..{role}")
    return ModelPair(
        pair.base,
        pair.tuned,
        prompts,
        name=pair.name,
        reading=reading,
        keep_both=pair.keep_both,
    )


def _at(mapped: _Mapped, role: str, pair: ModelPair, progress: Progress | None) -> MappedPosition:
    """One position, measured."""
    patching, effort = mapped.plan.settings, mapped.grid.settings.effort
    activations = PairActivations(pair, batch_size=mapped.place.prompts_per_pass)
    maps = fit_maps(
        pair,
        mapped.plan.layer,
        patching.map_kind,
        scope=patching.map_scope,
        seed=effort.seed,
        activations=activations,
    )
    experiment = prepare(pair, maps, patching, mapped.place, activations=activations)
    grid = measure_grid(Measurer(experiment, mapped.store), patching, effort, progress)
    # The text of the patched tokens of each prompt, as the tuned model reads them.
    read, tokenizer = pair.tokens("tuned", mapped.split), pair.tuned.tokenizer
    texts = [
        "".join(decoded(tokenizer, tokens[at]) for at in spots)
        for tokens, spots in zip(read.token_ids, read.spots, strict=True)
    ]
    return MappedPosition.of(role, texts, len(pair.prompts.split(FIT_SPLIT)), grid)
