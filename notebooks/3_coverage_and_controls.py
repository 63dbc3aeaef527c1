# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Coverage, random baselines, controls
#
# You will see how few heads carry most of the effect, what the same number of random heads carries,
# what is left when heads are ranked on one half of the prompts and scored on the other, and a table of
# everything else that could explain the effect. The last part shows a layer of which nothing can be
# said, and how the package says so.

# %%
import sys

if "google.colab" in sys.modules:  # elsewhere the package is installed already
    import subprocess

    packages = ["rq4lens", "transformer-lens<4"]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *packages], check=True)

# %%
import pandas as pd

import rq4lens as rq

pd.options.display.max_colwidth = None
pair = rq.load_pair("etiquette")
maps = rq.fit_maps(pair, layers=[0, 1, 2])
experiment = rq.prepare(pair, maps)
settings = rq.Patching(layer=1, control_layer=2, alpha=0.3)
run = rq.measure_grid(experiment, settings, rq.Effort(resamples=2000))

# %% [markdown]
# ## Coverage
#
# `ΔKL(S) = KL_raw(S) - KL_mapped(S)` is how much of the raw patch's damage the map repairs when the
# heads `S` are patched together, and `coverage(S) = 100 ΔKL(S) / ΔKL(ALL)`. It is 0 for no head and
# 100 for all; in between it may be negative or above 100 and is never clipped. Beside the top k heads
# stand three random sets of k heads, drawn with fixed seeds.

# %%
full = run.full.delta
pd.DataFrame(
    {
        "k": k,
        "top k": f"{100 * run[f'top{k}'].delta / full:.1f}%",
        **{
            f"random, seed {s}": f"{100 * run[f'rand{k}_s{s}'].delta / full:.1f}%"
            for s in (0, 1, 2)
        },
    }
    for k in run.settings.patching.k
).set_index("k")

# %% [markdown]
# Three random sets are an anecdote. The analysis enumerates all sets of a size where there are few and
# draws many where there are not, and adds what follows. (Fewer draws than by default, to be quick;
# `neutral` are prompts that the fine-tune is not about.)

# %%
neutral = rq.prepare(pair, maps, rq.Patching(split="neutral"))
analysis = rq.analyse(
    run,
    experiment,
    rq.AnalysisEffort(methods=("delta",), alphas=(0.3,), n_random_sets=100, random_ks=()),
    beside=rq.Beside(neutral=neutral),
)
rq.figures.coverage_curve(run, analysis)

# %% [markdown]
# How to read it. *best k* ranks and scores on the same prompts. *cross-fitted* ranks on one half and
# scores on the other, so it cannot profit from luck. *best subset* is the best set of each size that a
# search found: how much better a ranking could have done. The band holds 95% of the random sets.
#
# ## The table behind it
#
# `optimism` is the plain coverage minus the cross-fitted one, in percentage points. `p` asks whether
# the heads ranked first on one half do better on the other half than the average random set of their
# size; selection is accounted for.


# %%
def text(estimate, digits=1):
    """A number with its 95% interval, or why there is none."""
    if estimate.value is None:
        return f"undefined: {estimate.reason}"
    ends = estimate.interval
    interval = f" [{ends.low:.{digits}f}, {ends.high:.{digits}f}]" if ends else ""
    return f"{estimate.value:.{digits}f}{interval}"


pd.DataFrame(
    {
        "k": row.k,
        "heads": ", ".join(run.label(head) for head in row.heads),
        "coverage %": text(row.coverage_pct),
        "cross-fitted %": text(row.cross_fitted_coverage_pct),
        "optimism": text(row.optimism_pct),
        "random mean %": f"{row.random_mean_pct:.1f}",
        "random 97.5% quantile": f"{row.random_high_pct:.1f}",
        "p": f"{row.p_value:.2g}",
    }
    for row in analysis.coverage
).set_index("k")

# %% [markdown]
# ## One number for the whole curve
#
# `area` is the area under the curve over k/H: 100 when the first head carries everything, 50 when all
# heads carry the same. `k90` is the fewest heads that reach 90%. Read them together: a large area with
# a large `k90` means that a few heads carry most of it and many carry the rest.

# %%
for curve in analysis.curves:
    print(f"{curve.ranking}: area {text(curve.area_pct)}%, k90 {text(curve.k90, 0)}")

# %% [markdown]
# ## Heads do not add up
#
# `Δ({i,j}) - Δ(i) - Δ(j)`: positive where two heads repair more together than apart. If heads added up,
# the sum of single-head ΔKL would equal ΔKL(ALL).

# %%
print(f"sum of singles over joint effect: {text(analysis.interactions.sum_over_joint, 2)}")
rq.figures.interaction_matrix(run, analysis.interactions)

# %% [markdown]
# ## What stands in for a head
#
# The ladder: a constant, base's own activation, a shift of the mean, the map, and what base's head writes
# stand in for each head at full strength. `recovered` says how much of what the head tells beyond a
# constant is there. A map that knows the prompt recovers it; a map of shuffled pairs does not.

# %%
rq.figures.ladder(analysis)

# %%
pd.DataFrame(
    {"stand-in": row.name, "question": row.question, "recovered %": text(row.recovered_pct)}
    for row in analysis.stand_ins
).set_index("stand-in")

# %% [markdown]
# ## What the numbers support
#
# These sentences are built from the numbers and change with them.

# %%
print(*analysis.claims, *analysis.study_claims, sep="\n")

# %% [markdown]
# ## When nothing can be said
#
# Coverage is a share of `ΔKL(ALL)`. Where that cannot be told from zero, a share of it means nothing,
# and coverage is undefined: no number, and a reason.

# %%
quiet = rq.measure_grid(experiment, rq.Patching(layer=0, alpha=0.3))
of_quiet = rq.analyse(quiet)
print("coverage of the top 2:", of_quiet.coverage[1].coverage_pct.value)
print("because", of_quiet.full.undefined_because)

# %% [markdown]
# **What this cannot say.** Random heads are a weak opponent when a layer has few active heads, as here:
# beating them shows that heads differ, not that the map is needed. For that read the controls. And all
# of it is about one layer, one α and these prompts.
