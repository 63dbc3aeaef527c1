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
# # Planted truth: test the method before you believe it
#
# You will see a model in which *you* changed chosen heads, so that the right answer is known; whether
# the ranking finds them, whether the map recovers the very rotation that was planted, and how often
# each ranking method and each significance test is right over many such models. All of it works on
# your own base model.

# %%
import sys

if "google.colab" in sys.modules:  # elsewhere the package is installed already
    import subprocess

    packages = ["rq4lens", "transformer-lens<4"]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *packages], check=True)

# %%
import pandas as pd
import torch

import rq4lens as rq

torch.manual_seed(0)
given = rq.load_pair("etiquette")
base = given.base.loaded
rotated, rewired = [rq.Head(1, 3), rq.Head(1, 9)], [rq.Head(1, 6)]
planted = rq.plant(
    base.model,
    rotated=rotated,
    rewired=rewired,
    how=rq.Planting(weights=("W_Q", "W_K"), drift=0.02, seed=1),
)
print({head.label: kind for head, kind in planted.truth.items()})

# %% [markdown]
# ## What was planted
#
# **Rotated** heads compute the same thing in other coordinates: `W_V R`, `b_V R`, `Rᵀ W_O` with a random
# rotation `R`. Their activations change, the model's function does not. The **rewired** head attends
# elsewhere (new content in `W_Q` and `W_K`): no map of its own activations explains that. **Drift** moves
# every weight a little, as a fine-tune does besides.
#
# First the claim that rotation leaves the function alone, on a copy that only has rotations:

# %%
only_rotated = rq.plant(base.model, rotated=rotated, how=rq.Planting(seed=1)).tuned
tokens = given.tokens("base", "val").token_ids[0]
with torch.no_grad():
    before, after = (model(torch.tensor([tokens])) for model in (base.model, only_rotated))
print(f"largest change of a logit: {float((after - before).abs().max()):.1g}")
print(f"largest logit:             {float(before.abs().max()):.1g}")

# %% [markdown]
# ## Does the method find them?
#
# The planted copy is paired with the model it was made from, and the usual job is run.

# %%
pair = rq.ModelPair(base, planted.loaded(base), given.prompts, name="planted")
maps = rq.fit_maps(pair, layers=[1])
run = rq.run_grid(pair, maps, layer=1, control_layer=None, alpha=0.3)
rq.figures.head_plane(run)

# %%
analysis = rq.analyse(run)
kinds = {row.head: row.kind for row in analysis.kinds.heads}
pd.DataFrame(
    {
        "head": run.label(head),
        "truth": planted.truth.get(rq.Head(1, head), "untouched"),
        "called": kinds[head],
        "KL_raw": f"{run.single(head).KL_raw:.1e}",
        "KL_mapped": f"{run.single(head).KL_mapped:.1e}",
        "ΔKL": f"{run.single(head).delta:.1e}",
        "drop %": f"{run.single(head).drop_pct:.1f}",
    }
    for head in run.ranking.top(6)
).set_index("head")

# %% [markdown]
# How to read it. A rotated head has a `KL_mapped` near 0: the map explains the change. The rewired head
# keeps most of its damage, and may still stand high in a ranking by `ΔKL`, because `ΔKL` is an amount: a
# few percent of a large damage can be more nats than all of a small one. `drop_pct` is a share and does
# not make this mistake; on heads with next to no damage it is a ratio of two tiny numbers instead.
#
# ## Does the map recover the rotation?
#
# The fit never saw `R`. The distance is `|W - R| / |R|`; a rotation drawn at random would be near √2.

# %%
for change in planted.changes:
    if change.kind == "rotated":
        head, truth = change.heads[0], change.rotation
        fitted = maps[1].weight[head.index].to(truth)
        other = torch.linalg.qr(torch.randn(truth.shape, dtype=truth.dtype))[0]
        apart = [float((each - truth).norm() / truth.norm()) for each in (fitted, other)]
        print(f"{head.label}: fitted map {apart[0]:.2f}, a random rotation {apart[1]:.2f}")

# %% [markdown]
# ## Many planted pairs
#
# One pair is an anecdote. `validate` plants many, of several kinds, and asks every method. The score is
# average precision: 1 when the planted heads come first, near their share of all heads for a guess.
# A method may also be a function of your own: this one ranks heads by their index and is here to show
# what knowing nothing looks like.


# %%
def by_index(measured):
    """Rank heads by their index: knows nothing."""
    scores = [-float(head) for head in range(measured.n_heads)]
    return rq.HeadRanking.from_scores(
        scores, method="by_index", layer=measured.layer, alpha=measured.alpha
    )


methods = ("delta", "drop_pct", "kl_raw", "attribution", by_index)
found = rq.validate(
    base,
    given.prompts,
    rq.ValidationSettings(methods=methods, layers=[1], pairs=2, n_train=160, n_val=32),
)
table = pd.DataFrame(
    {
        "method": row.method,
        "scenario": row.scenario,
        "precision": sum(row.average_precision) / len(row.average_precision),
    }
    for row in found.recoveries
)
table.pivot(index="method", columns="scenario", values="precision").round(2)

# %% [markdown]
# ## Are heads called what they are?
#
# How often heads that were changed in some way (or not at all) were given their kind. A planted head
# that matters little to the model is rightly called idle.

# %%
counts = pd.DataFrame(
    {"truth": truth, "called": verdict, "n": n} for (_, truth, verdict), n in found.kinds.items()
)
counts.pivot_table(index="truth", columns="called", values="n", aggfunc="sum", fill_value=0)

# %% [markdown]
# ## And where nothing is?
#
# In null experiments two equally wrong maps are compared, so that nothing repairs anything. The
# corrected test should raise an alarm in at most the promised share of them; the interval says how much
# so few experiments can tell.

# %%
alarms = found.false_alarms
low, high = alarms.ci95
print(f"{alarms.n_alarms} of {alarms.n_nulls} null experiments: {alarms.rate:.1%} alarms")
print(f"the true rate lies between {low:.1%} and {high:.1%}; promised {alarms.level:.0%}")

# %% [markdown]
# `rq4lens validate --base BASE --prompts prompts.jsonl` does this for your own base model, with every
# method and more pairs. **What this cannot say.** Planted changes are clean: a fine-tune changes many
# heads a little and some in ways that are neither a rotation nor a rewiring. A method that fails here
# will not be right there; one that passes here may still be.
