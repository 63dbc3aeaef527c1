"""The answer in plain sentences; each changes with the numbers and claims no more than they do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rq4lens.analysis.effects.table import MOST_LEFT_OUT_PCT
from rq4lens.analysis.records import SHUFFLED, Analysis, CoverageRow, Gap, LadderRow, LayerTransfer
from rq4lens.analysis.statistics.bootstrap import Estimate, number_text
from rq4lens.analysis.statistics.sign_flips import SIGNIFICANT
from rq4lens.heads import Head
from rq4lens.results import UNRELATED_COSINE

FEWEST_GROUPS = 10
"""Nothing is claimed from fewer groups of prompts."""

LITTLE_PCT = 5.0
"""A layer that carries less than this of the gap, with its whole interval, carries little."""

MOST_PCT = 50.0
"""Heads that reach this share of what their layer does carry most of it."""

NAMED = 8
"""So many heads are named in a sentence."""

FEW_PROMPTS = 50
"""An effect that lies on fewer prompts than this is uncertain, whatever its interval says."""

TIMES_NOISE = 1.5
"""The whole interval of the gap lies above so many gaps of the noise pair, which is a single draw.
Of 3,312 pairs of draws none did; of lower lines each was crossed (docs/trust.md has the curve)."""

NOTHING, NO_SHARE = "Nothing is claimed about heads", "no share of the map's repair is claimed"

TOO_NARROW = (
    "intervals of what a map keeps are too narrow (they held the truth in 61 to 80% of simulated "
    "studies)"
)
"""What holds less often than it says; the table is in docs/analysis.md."""

FEW_GROUPS = 80
GIVES_TOO_NARROW = (
    f"below {FEW_GROUPS} groups, intervals of what heads give base are a little too narrow (they "
    "held the truth in 86 to 88% of simulated studies)"
)
"""The same table, for transfer to the tuned model."""

WIDE_PCT = 100.0
"""A share whose interval is wider than this is not determined."""


def claims(analysis: Analysis) -> tuple[str, ...]:
    """The answer: how far apart, how much of it here, which heads, what kind, how uncertain."""
    gap, stop = _gap(analysis)
    if stop is not None:
        return (gap, stop, f"{_over(analysis)}.")
    return (gap, _layer(analysis), _heads(analysis), _kinds(analysis), _uncertain(analysis))


def study_claims(analysis: Analysis) -> tuple[str, ...]:
    """What the study's own grid says: the repair by the map, its coverage, the control layer."""
    settings, full = analysis.settings.grid, analysis.full
    where = f"At strength {settings.patching.alpha:g}"
    why = full.undefined_because or _no_claim(analysis) or _no_repair(analysis)
    if why is not None:
        return (f"{where} {NO_SHARE}: {why}.",)
    if full.is_harm:
        harm = f"{where} the map does harm: ΔKL(ALL) is {full.delta:.3g} nats, the mapped patch "
        return (f"{harm}damages more than the raw one.", *_control(analysis))
    repair = f"{where} the map takes back {full.delta:.3g} nats of the raw patch's damage."
    return (repair, *_coverage(analysis), *_across_alphas(analysis), *_control(analysis))


# The gap, and what forbids any further claim


def _gap(analysis: Analysis) -> tuple[str, str | None]:
    """The first sentence, and the one that ends the answer if nothing can be claimed."""
    gap, n = analysis.gap, analysis.settings.n_prompts
    if gap.undefined_because is not None:
        first = "How far base and tuned differ here is not known."
        if _is_alike(gap):
            first = "Base and tuned cannot be told apart here."
        return first, f"{NOTHING}: {gap.undefined_because}."
    differ, in_noise = number_text(gap.answers_differ_pct.value, ".0f%"), ""
    noise = analysis.noise
    times = None if noise is None else noise.real_over_noise["gap_base_nats"].value
    if times is not None:
        in_noise = f" ({plain(times)} times what the same weight change gives when it is shuffled)"
    first = (
        f"Base and tuned differ by {gap.base_nats:.2g} nats here, and on {differ} of {n} prompts "
        f"their most likely next tokens differ{in_noise}."
    )
    why = _no_claim(analysis)
    return first, None if why is None else f"{NOTHING}: {why}."


def _is_alike(gap: Gap) -> bool:
    """Whether a gap that is no gap is measured, and not clearly above 0."""
    value, left_out = gap.base_nats.value, max(gap.left_out_base_pct, gap.left_out_tuned_pct)
    if value is None or left_out > MOST_LEFT_OUT_PCT:
        return False
    return gap.base_nats.interval is not None or value <= gap.noise_nats


def plain(value: float) -> str:
    """Two digits, without powers of ten."""
    return f"{float(f'{value:.2g}'):,.0f}" if value >= 10 else f"{value:.2g}"


def _no_claim(analysis: Analysis) -> str | None:
    """Why nothing is claimed of this pair on these prompts; None if something may be."""
    n_groups, cosine = analysis.settings.n_groups, analysis.weight_cosine
    if n_groups < FEWEST_GROUPS:
        return f"{n_groups} groups of prompts are too few ({FEWEST_GROUPS} are needed)"
    if cosine is not None and cosine < UNRELATED_COSINE:
        return (
            f"the weights of the two models look unrelated (cosine {cosine:.2g}), so that this is "
            "no fine-tune of that base"
        )
    if analysis.noise is None:
        return None
    times = analysis.noise.real_over_noise["gap_base_nats"]
    clearly = times.interval is None or times.interval.low > TIMES_NOISE
    if clearly and _is_above(analysis.noise.gap_beyond_nats):
        return None
    if times.value is not None and times.value > TIMES_NOISE:
        return (
            f"the gap is not clearly more than {TIMES_NOISE:g} times that of a shuffled weight "
            f"change of the same size ({times:.2g} times)"
        )
    return (
        f"a shuffled weight change of the same size moves base about as far "
        f"({analysis.noise.gap_base_nats:.2g} nats)"
    )


def _no_repair(analysis: Analysis) -> str | None:
    """Why the map's repair is too small to speak of shares of it."""
    noise, delta = analysis.noise, analysis.full.delta.value or 0.0
    gap = analysis.gap.base_nats.value
    if noise is not None and not (_is_above(noise.delta_beyond_nats) or analysis.full.is_harm):
        noisy = f"{noise.delta:.2g} nats"
        return f"it is not clearly more than the noise pair's map takes back ({noisy})"
    if gap is not None and abs(delta) < LITTLE_OF_GAP * gap:
        return f"it is {delta:.2g} nats, less than {100 * LITTLE_OF_GAP:g}% of the gap"
    return None


LITTLE_OF_GAP = 0.001
"""A repair below this share of the gap is too small to be divided among heads."""


# The layer and its heads


def _layer(analysis: Analysis) -> str:
    here, gap = analysis.transfer, analysis.gap
    layer, at = f"layer {analysis.settings.grid.layer}", _where(analysis)
    if _carries_little(here):
        size = f"{share(here.to_base_pct)} of it undone, {share(here.to_tuned_pct)} of it given"
        first = f"What {layer}'s heads say {at} carries next to nothing of that ({size})"
    else:
        first = (
            f"Giving {layer}'s heads the base model's activations undoes "
            f"{share(here.to_base_pct)} of that, and the tuned ones give base "
            f"{share(here.to_tuned_pct)} of it"
        )
    every = gap.every_layer_to_base_pct, gap.every_layer_to_tuned_pct
    if every[0].value is None:
        return f"{first}."
    rest, here_pct = "", here.to_base_pct.value or 0.0
    # Where one layer undoes more than all of them, heads work against each other: there is no rest.
    if here_pct < (every[0].value or 0.0) < 90:
        rest = f"; the rest is not in what heads say {at}"
    return f"{first}; all heads of all layers {share(every[0])} and {share(every[1])}{rest}."


def _where(analysis: Analysis) -> str:
    """Where heads are patched, as a sentence says it."""
    grid = analysis.settings.grid
    named = ("patched at", "answer tokens")
    several = grid.patching.k_positions > 1 or any(each in grid.decision_rule for each in named)
    return "at the patched tokens" if several else "at this token"


def _carries_little(here: LayerTransfer) -> bool:
    both = here.to_base_pct, here.to_tuned_pct
    return all(each.interval is not None and each.interval.high < LITTLE_PCT for each in both)


def _heads(analysis: Analysis) -> str:
    here = analysis.transfer
    if not _is_above(here.to_base_pct) or _carries_little(here):
        return "Which of its heads carry it is not asked: there is too little to divide."
    found = next((each for each in analysis.directions if each.direction == "to_base"), None)
    row = None if found is None else decisive_row(found.coverage, here.to_base_pct.value or 0.0)
    if row is None:
        best = _best(here)
        alone = f"{label(analysis, best)} alone undoes {share(here.heads_to_base_pct[best])}"
        ranked = ", ranked and scored on the same prompts"
        return f"Of its heads {alone} of the gap{ranked}; no larger set was scored on others."
    names = _labels(analysis, row.heads)
    crossed = row.cross_fitted_coverage_pct
    # A head that ranks first on any half of the prompts was not chosen by luck.
    optimism = row.optimism_pct.value
    is_alone = row.k == 1 and optimism is not None and abs(optimism) < 1e-9
    on_others = crossed.value is not None and not is_alone
    amount = share(crossed if on_others else row.coverage_pct)
    scored = " when ranked on other prompts" if on_others else ""
    few = _is_most(row, here.to_base_pct.value or 0.0)
    top = f"{'The' if few else 'the'} top {row.k} heads ({names}) undo"
    who = f"{names} alone undoes" if row.k == 1 else top
    who = who if few else f"No small set of heads carries most of it: {who}"
    back = here.heads_to_tuned_pct[row.heads[0]]
    other = f", and gives base {share(back)}" if row.k == 1 else ""
    return f"{who} {amount} of the gap{scored}{other}; {_beside_random(row)}."


def _best(here: LayerTransfer) -> int:
    """The head that alone takes tuned furthest back."""
    heads = [each.value or 0.0 for each in here.heads_to_base_pct]
    return heads.index(max(heads))


def decisive_row(rows: Sequence[CoverageRow], whole_pct: float) -> CoverageRow | None:
    """The fewest heads that clearly carry most of what the layer does, or the largest set."""
    return next((row for row in rows if _is_most(row, whole_pct)), rows[-1] if rows else None)


def _is_most(row: CoverageRow, whole_pct: float) -> bool:
    """Whether a set clearly does most of what the layer does."""
    crossed = row.cross_fitted_coverage_pct
    found = row.coverage_pct if crossed.value is None else crossed
    low = found.value if found.interval is None else found.interval.low
    return low is not None and low > MOST_PCT / 100 * whole_pct


def _beside_random(row: CoverageRow) -> str:
    mean = number_text(row.random_mean_pct, ".0f%")
    which = "a random head does" if row.k == 1 else f"{row.k} random heads do"
    if row.p_value is None or (row.p_value_min or 0.0) > SIGNIFICANT:
        return f"{which} {mean} on average"
    clearly = "clearly less" if row.p_value <= SIGNIFICANT else "not clearly less"
    return f"{which} {mean} on average, {clearly} ({p_text(row.p_value)})"


def p_text(p_value: float) -> str:
    """A p-value; very small ones say that they are small, not how small."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.2g}"


# What kind of change


def _kinds(analysis: Analysis) -> str:
    """The heads that changed, those that did most first; then what is open, and what did not."""
    kinds = analysis.kinds
    if not analysis.ladders:
        return "What kind of change it is was not measured: the full analysis does."
    told = []
    for alike in _alike(analysis):
        verb, kind = "were" if len(alike) > 1 else "was", kinds.heads[alike[0]].kind
        told.append(f"{_labels(analysis, alike)} {verb} {kind}{_evidence(analysis, alike[0])}")
    for each in analysis.stand_ins:
        if each.name == SHUFFLED and each.recovered_pct.value is not None and told:
            kept = each.recovered_pct.value
            much = f"{kept:.0f}%" if kept > 0 else "nothing"
            told.append(f"a map of shuffled pairs keeps {much} of what changed heads tell")
    for kind in ("undecided", "unchanged"):
        if heads := kinds.of(kind):
            verb = "are" if len(heads) > 1 else "is"
            told.append(f"{_labels(analysis, _by_size(analysis, heads))} {verb} {kind}")
    n_idle = len(kinds.of("idle"))
    idle = [f"{n_idle} heads are idle" if n_idle > 1 else "one head is idle"] if n_idle else []
    return f"By kind of change: {'; '.join([*told, *idle])}."


def _alike(analysis: Analysis) -> list[list[int]]:
    """The changed heads by kind, and by whether ``W_O`` undoes it; those that did most first."""
    changed = analysis.kinds.of("replaced", "reassigned", "recoded", "shifted")
    groups: dict[tuple[str, bool | None], list[int]] = {}
    for head in _by_size(analysis, changed):
        kind = analysis.kinds.heads[head]
        groups.setdefault((kind.kind, kind.function_kept), []).append(head)
    return list(groups.values())


def _by_size(analysis: Analysis, heads: Sequence[int]) -> list[int]:
    """Heads by what a constant in their place costs."""
    ladder = analysis.ladders[0]
    costs = {head: ladder[f"head{head}"].damage_nats["constant"].value or 0.0 for head in heads}
    return sorted(heads, key=lambda head: -costs[head])


def _kept(estimate: Estimate) -> str:
    """What is kept of something, or that nothing or less than nothing is."""
    if estimate.interval is not None and estimate.interval.high < 0:
        return f"does harm ({share(estimate)})"
    nothing = estimate.value is not None and estimate.value < 0
    return f"keeps nothing ({share(estimate)})" if nothing else f"keeps {share(estimate)}"


MEANINGS = {
    "replaced": "the map does not give back what it said",
    "reassigned": "the map works only on the contents it was fitted on",
    "recoded": "the same content in other coordinates",
}


def _evidence(analysis: Analysis, head: int) -> str:
    """The numbers behind the kind of the first head named."""
    kind = analysis.kinds.heads[head]
    if kind.kind not in MEANINGS:
        return ""
    recovered = analysis.ladders[0][f"head{head}"].recovered_pct
    parts = [f"the map {_kept(recovered['mapped'])} of what {label(analysis, head)} tells"]
    if "held_out" in recovered:
        parts.append(f"with its content held out it {_kept(recovered['held_out'])}")
    if analysis.neutral is not None:
        parts.append(f"on neutral prompts it {_on_neutral(analysis.neutral[f'head{head}'])}")
    undone = {True: ", and W_O undoes it", False: ", and W_O does not undo it", None: ""}
    meaning = f" ({kind.why or MEANINGS[kind.kind]}{undone[kind.function_kept]})"
    return f"{meaning}: {', '.join(parts)}"


def _on_neutral(row: LadderRow) -> str:
    if row.recovered_pct["mapped"].value is not None:
        return _kept(row.recovered_pct["mapped"])
    mapped, raw = (number_text(row.damage_nats[each].value, ".2g") for each in ("mapped", "raw"))
    return f"does {mapped} nats of damage (raw {raw})"


# What is uncertain


def _over(analysis: Analysis) -> str:
    """What the intervals are over."""
    settings = analysis.settings
    groups = "" if settings.n_groups == settings.n_prompts else f" in {settings.n_groups} groups"
    these = f"these {settings.n_prompts}" if settings.n_prompts > 1 else "this one"
    over = f"The intervals are over more prompts like {these}{groups}"
    if analysis.kinds.n_contents:
        over += f", about the same {analysis.kinds.n_contents} contents"
    return f"{over} and with this map"


def _uncertain(analysis: Analysis) -> str:
    found, n_eff = [_over(analysis)], analysis.transfer.n_eff
    if analysis.kinds.few_contents:
        found.append("so few contents that a map can send each of them anywhere")
    n_prompts = analysis.settings.n_prompts
    if n_eff is not None and n_eff < min(FEW_PROMPTS, n_prompts / 2):
        found.append(f"about {n_eff:.0f} of the prompts carry most of the layer's effect")
    if analysis.noise is None:
        found.append("the gap was not compared with that of a shuffled weight change")
    if analysis.settings.n_groups < FEW_GROUPS:
        found.append(GIVES_TOO_NARROW)
    if analysis.ladders:
        found.append(TOO_NARROW)
    undecided = analysis.kinds.of("undecided")
    if undecided and analysis.ladders:
        why = analysis.kinds.heads[undecided[0]].why
        found.append(f"{label(analysis, undecided[0])} is undecided because {why}")
    return f"{'; '.join(found)}."


# The study's grid


def _coverage(analysis: Analysis) -> Iterator[str]:
    row = decisive_row(analysis.coverage, 100.0)
    if row is None:
        return
    crossed = row.cross_fitted_coverage_pct
    names = _labels(analysis, row.heads)
    which = f"{names} alone covers"
    if row.k > 1:
        which = f"the top {row.k} heads by {row.ranking} ({names}) cover"
    if crossed.value is None:
        yield f"Of that {which} {share(row.coverage_pct)}, on the prompts that ranked them."
    else:
        yield (
            f"Of that {which} {share(crossed)} when ranked on other prompts; {_beside_random(row)}."
        )


def _across_alphas(analysis: Analysis) -> Iterator[str]:
    """How the share of the head that carries most moves with the strength."""
    if len(analysis.alphas) < 2:
        return
    own = analysis.settings.grid.patching.alpha
    at_own = next(point for point in analysis.alphas if point.alpha == own)
    head = at_own.heads[0]
    shares = ", ".join(
        f"{number_text(point.coverage_pct[head].value, '.0f%')} at {point.alpha:g}"
        for point in analysis.alphas
        if point.coverage_pct
    )
    yield f"Shares depend on the strength: {label(analysis, head)} alone covers {shares}."


def _control(analysis: Analysis) -> Iterator[str]:
    control = analysis.control_layer
    if control is not None:
        yield f"Control {control_reading(control.layer, control.less_nats)}."


def control_reading(layer: int, less_nats: Estimate) -> str:
    """The control layer beside the main one, in words."""
    low = less_nats.interval
    if low is None:
        return f"layer {layer}: nothing shows how the two layers compare"
    if low.low > 0:
        return f"layer {layer}: the map repairs less there, by {less_nats:.2g} nats"
    if low.high < 0:
        return f"layer {layer}: the map repairs MORE there, so it is no control"
    return (
        f"layer {layer}: not clearly different, so nothing shows that the effect is specific to "
        "the main layer"
    )


# Words


def share(estimate: Estimate) -> str:
    """A share in percent with its interval, or that it is not determined."""
    if estimate.interval is not None:
        low, high = estimate.interval
        if high - low > WIDE_PCT and low < 0 < high:
            return f"an undetermined share ({low:.0f} to {high:.0f}%)"
    return format(estimate, ".0f%")


def label(analysis: Analysis, head: int) -> str:
    """Name of a head of the main layer."""
    return Head(analysis.settings.grid.layer, head).label


def _labels(analysis: Analysis, heads: Sequence[int]) -> str:
    names = [label(analysis, head) for head in heads[:NAMED]]
    return ", ".join([*names, "..."] if len(heads) > NAMED else names)


def _is_above(estimate: Estimate) -> bool:
    """Whether the whole interval lies above 0."""
    return estimate.interval is not None and estimate.interval.low > 0


def metric_sentences(analysis: Analysis) -> tuple[str, ...]:
    """The metric in both models, and what the layer's heads carry of its difference."""
    found, layer = analysis.metric, analysis.settings.grid.layer
    if found is None:
        return ()
    unit = found.unit
    clean = f"{found.name} is {found.base:.3g}{unit} in base and {found.tuned:.3g}{unit} in tuned"
    if found.undefined_because is not None:
        return (f"{clean}; shares of the difference are undefined: {found.undefined_because}.",)
    best = _best(found)
    return (
        f"{clean}. Of the difference the heads of layer {layer} undo {found.to_base_pct:.1f%} and "
        f"give base {found.to_tuned_pct:.1f%}, all heads of all layers "
        f"{found.every_layer_to_base_pct:.1f%} and {found.every_layer_to_tuned_pct:.1f%}; "
        f"{Head(layer, best).label} alone undoes {found.heads_to_base_pct[best]:.1f%}.",
    )
