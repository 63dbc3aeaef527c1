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
# # Ranking heads, and how far to trust it
#
# You will see the heads of one layer ranked, what kind of change each of them shows, how firmly each
# stands at its rank, which of them differ from zero after correction for having looked at all of them,
# and whether other ways of ranking, other blend strengths and other maps agree.

# %%
import sys

if "google.colab" in sys.modules:  # elsewhere the package is installed already
    import subprocess

    packages = ["rq4lens", "transformer-lens<4"]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *packages], check=True)

# %%
import pandas as pd

import rq4lens as rq

pair = rq.load_pair("etiquette")
maps = rq.fit_maps(pair, layers=[1])
experiment = rq.prepare(pair, maps)
run = rq.measure_grid(experiment, rq.Patching(layer=1, alpha=0.3), rq.Effort(resamples=2000))
print(f"{run.n_heads} heads of layer 1, {run.n_prompts} prompts")

# %% [markdown]
# ## The ranking
#
# Each head is patched by itself, twice. The **raw** patch blends the base model's activation into the
# tuned model; `KL_raw` is what this does to the next-token distribution. The **mapped** patch sends
# the base activation through the fitted map first. `ΔKL = KL_raw - KL_mapped`, in nats, is how much of
# the damage the map repairs, and it ranks the heads. Bars are 95% bootstrap intervals over prompts.

# %%
rq.figures.ranking_bars(run)

# %% [markdown]
# ## Damage and repair
#
# Each head at what its raw patch does and what is left of it with the map. Which kind of change a head
# shows is told by the ladder, which the analysis below measures.

# %%
rq.figures.head_plane(run)

# %% [markdown]
# ## The analysis
#
# `rq.analyse` does everything of the report. Here it compares six ranking methods instead of thirteen
# and draws fewer resamples and random sets than by default, to be quick.

# %%
analysis = rq.analyse(
    run,
    experiment,
    rq.AnalysisEffort(
        methods=("delta", "drop_pct", "kl_raw", "leave_one_out", "attribution", "kl_curvature"),
        alphas=(0.1, 0.3, 1.0),
        n_random_sets=20,
        random_ks=(),
    ),
)
print("methods:", ", ".join(ranking.method for ranking in analysis.rankings))
print("α:", ", ".join(f"{point.alpha:g}" for point in analysis.alphas))

# %% [markdown]
# ## How firmly does each head stand at its rank?
#
# Prompts are resampled, whole groups at a time, and heads are ranked again. `rank range` holds 95% of
# the ranks a head had; `in top 4` is the share of resamples in which it was among the best four. A wide
# range means: on other prompts this head could stand elsewhere.

# %%
pd.DataFrame(
    {
        "head": run.label(row.head),
        "ΔKL (nats)": f"{row.score.value:.2g}",
        "rank": row.rank,
        "rank range": f"{row.rank_low} to {row.rank_high}",
        "in top 4": f"{row.top_probability[4]:.0%}",
    }
    for row in analysis.stability.heads
).set_index("head")

# %% [markdown]
# Split the prompts in two and rank on each half: the rank correlation of the halves, and how much of
# their best four they share (`|A ∩ B| / |A ∪ B|`).

# %%
halves = analysis.stability
print(f"Spearman between halves: {halves.split_half_spearman.value:.2f}")
print(f"overlap of their best four: {halves.split_half_jaccard[4].value:.2f}")

# %% [markdown]
# ## Does a head differ from zero at all?
#
# With many heads and several α, some would look active by luck. Signs of whole groups of prompts are
# flipped at random; the p-value of a head is the share of flips whose *largest* statistic over
# everything tried reaches the head's own. Small is not the same as important: where prompts agree, an
# effect of a millionth of a nat is significant too.

# %%
at_alpha = [test for test in analysis.tests.tests if test.alpha == 0.3]
pd.DataFrame(
    {
        "head": test.head.label,
        "ΔKL (nats)": f"{test.delta:.2g}",
        "p alone": f"{test.p_value:.2g}",
        f"p corrected for all {len(analysis.tests.tests)} tests": f"{test.p_max_t:.2g}",
    }
    for test in sorted(at_alpha, key=lambda test: -test.delta)
).set_index("head")

# %% [markdown]
# ## Do other methods agree?
#
# `delta`, `drop_pct`, `kl_raw` and `leave_one_out` patch and measure; `attribution` and `kl_curvature`
# only use gradients. Kendall's τ is 1 for the same order, 0 for unrelated ones and -1 for the reverse.
# A low τ alone is no alarm: it counts every idle head as much as the first one.

# %%
drawn = rq.figures.run_figures(run, analysis)
drawn["methods_agreement"]

# %% [markdown]
# What counts is how much the best heads of each method carry **together**: coverage is `100 ΔKL(S) /
# ΔKL(ALL)` of a head set `S`. Single-head scores cannot see heads that act together, which is why a
# method that removes heads from the whole layer may order them differently.

# %%
drawn["methods"]

# %% [markdown]
# ## Does the blend strength matter?
#
# The same heads ranked at several α. Lines that cross low down join heads that do next to nothing; a
# crossing near the top would mean that the choice of α decides the result.

# %%
drawn["alpha_flow"]

# %% [markdown]
# ## Is it an effect of many prompts or of a few?
#
# Each point is one prompt. A mean that rests on a handful of prompts shows as a box at zero with a tail.

# %%
rq.figures.per_prompt(run, top=4)

# %% [markdown]
# **What this cannot say.** The ranking was made on the prompts that show it: the best heads of any
# layer look a little too good on the prompts that chose them. Notebook 3 ranks on one half and scores
# on the other. Head indices mean nothing across layers (notebook 4), and a patch at the decision token
# does not see what a head does at earlier positions. Which methods find heads that are *known* to have
# changed is the question of notebook 6.
