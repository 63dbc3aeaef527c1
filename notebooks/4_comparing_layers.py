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
# # Comparing layers
#
# You will see every head of every layer from one clean pass of each model, one ranking of all of them,
# how concentrated each layer's effect is, and which layers the sweep proposes as main and control. The
# command line does the same with `rq4lens sweep --pair etiquette`.

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
sweep = rq.sweep_layers(rq.preset("etiquette").updated(resamples=2000))
print(sweep.summary)

# %% [markdown]
# ## Where the change lies
#
# Each cell is one head patched by itself. The switch above the figure (in your own notebook) changes
# between `ΔKL`, `KL_raw`, `KL_mapped` and the drop `100 ΔKL / KL_raw`. Read rows, not columns: **head 3
# of one layer is not head 3 of another.**

# %%
rq.figures.layer_heatmap(sweep.grids)

# %% [markdown]
# ## One ranking of all heads of all layers
#
# `ΔKL` is in nats in every layer, so heads of different layers can stand in one list. The axis is
# logarithmic where effects differ by orders of magnitude.

# %%
rq.figures.global_ranking(sweep.grids, sweep.comparison, top=20)

# %% [markdown]
# The same list with the range of ranks over resampled prompts. Ranges that overlap mean that these
# heads could change places.

# %%
pd.DataFrame(
    {
        "head": row.head.label,
        "rank": row.rank,
        "rank range": f"{row.rank_low} to {row.rank_high}",
        "ΔKL (nats)": f"{row.delta.value:.2g}",
    }
    for row in sweep.comparison.ranking[:10]
).set_index("head")

# %% [markdown]
# ## Each layer's own curve
#
# Coverage in each layer is a share of that layer's own `ΔKL(ALL)`, so a steep curve says that few heads
# carry the layer's effect, not that the effect is large. Read it beside the sizes above. A layer whose
# `ΔKL(ALL)` cannot be told from zero has no curve; the setting line names it.

# %%
rq.figures.layer_curves(sweep.grids, sweep.comparison, main=sweep.choice.main)

# %% [markdown]
# ## Concentration
#
# Of single-head `|ΔKL|`: the Gini coefficient is 0 when all heads are equal and near 1 when one has
# everything; *effective heads* is the exponential of the entropy, between 1 and H. *Churn* is the share
# of a layer's heads that are above the 80th percentile of all heads of all layers.

# %%
pd.DataFrame(
    {
        "layer": row.layer,
        "KL_raw(ALL)": f"{row.KL_raw.value:.2g}",
        "ΔKL(ALL)": f"{row.delta.value:.2g}",
        "Gini": f"{row.concentration.gini.value:.2f}",
        "effective heads": f"{row.concentration.effective_heads.value:.1f}",
        "churn": f"{row.pooled_churn:.0%}",
        "coverage": row.full.undefined_because or "defined",
    }
    for row in sweep.comparison.rows
).set_index("layer")

# %% [markdown]
# ## Which layers to look at
#
# The main layer is the one whose map repairs most, among layers after the first whose raw patch does
# some damage. The control is, among layers that clearly repair less, the one whose raw patch does most:
# where nothing is damaged, nothing could have been repaired, and a control with no damage says little.

# %%
print(*sweep.choice.reasons, sep="\n")

# %% [markdown]
# ## What index-by-index comparison is worth
#
# Rank correlations between two layers can be computed, and mean nothing: nothing ties head 3 of one
# layer to head 3 of the next. They come with a note that says so.

# %%
for row in sweep.comparison.by_index[:2]:
    print(f"{row.first} and {row.second}: Kendall's τ {row.kendall.value:.2f}")
print(sweep.comparison.by_index[0].note)

# %% [markdown]
# Every layer of the sweep is an ordinary grid: `rq.figures.ranking_bars(sweep.grids[2])` and everything
# of notebooks 2 and 3 works on it. **What this cannot say:** layers were chosen on the prompts that
# show them. To claim a layer, choose it on one set of prompts and report it on another.
