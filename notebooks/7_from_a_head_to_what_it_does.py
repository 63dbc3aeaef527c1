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
# # From a head to what it does
#
# You will see what one head reads, writes and decides in both models: a ranking names `L1H0` of the built-in
# pair, and its card says, in the words of that world, what the head is for and what the fine-tune did to it.

# %%
import sys

if "google.colab" in sys.modules:  # elsewhere the package is installed already
    import subprocess

    packages = ["rq4lens", "transformer-lens<4"]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *packages], check=True)

# %%
import pandas as pd
import plotly.express as px

import rq4lens as rq

pair = rq.load_pair("etiquette")
maps = rq.fit_maps(pair, layers=[1])
grid = rq.run_grid(pair, maps, layer=1, alpha=0.3)
best = grid.label(grid.ranking.top(1)[0])
print("first by ΔKL:", best)
print(pair.prompts.split("val").texts[0])

# %% [markdown]
# A story says which country sends which person; the prompt ends at a person, and the model has to say
# what that person brings to an occasion. The custom depends on the country and on the occasion, so the
# country has to be fetched from the story.
#
# ## The card
#
# One clean pass of each model, and one row a prompt for each swap. Of a finished run,
# `rq.head_card(rq.read_run("runs/demo"), "L1H0")` gives the same, and so does
# `rq4lens head runs/demo L1H0` on the command line.

# %%
card = rq.head_card(pair, best, grid=grid, maps=maps, n_prompts=2)
card

# %% [markdown]
# The summary in three numbers: how far this head alone takes the tuned model back to base, base to
# tuned, and how much of that is direct.

# %%
for name in ("to_base_pct", "to_tuned_pct", "direct_pct"):
    print(f"{name:<13}{getattr(card.carried, name):.1f%}")

# %% [markdown]
# Nearly all of what the fine-tune changed goes through this one head, and next to nothing of it goes
# straight to the answer: later layers read what it writes.
#
# ## What it reads
#
# With more prompts in the card, attention can be summed by what the tokens are in this world. The
# prompts say who was asked about.

# %%
many = rq.head_card(pair, best, grid=grid, maps=maps, n_prompts=320)
about = {prompt.id: prompt.meta for prompt in pair.prompts.split("val")}


def places(read, person):
    """Attention by what a token is in the story."""
    tokens, share = read.tokens, read.attention
    at = next(n for n, token in enumerate(tokens) if token == person and tokens[n - 1] == "sends")
    named = {
        "their country": share[at - 2],
        "the person, where a country sends them": share[at],
        "the stop behind them": share[at + 1],
        "the occasion": share[len(tokens) - 3],
    }
    return {**named, "elsewhere": 1 - sum(named.values())}


reads = pd.DataFrame(
    [
        {"model": side, **places(getattr(each, side), about[each.prompt]["person"])}
        for each in many.decides
        for side in ("base", "tuned")
    ]
)
shares = 100 * reads.groupby("model").mean()
px.bar(
    shares.reset_index().melt("model", var_name="token", value_name="attention, %"),
    x="attention, %",
    y="model",
    color="token",
    title=f"What {best} reads from the decision token",
    height=320,
)

# %% [markdown]
# In both models the head looks back to where the story sends that very person: a lookup by name. The
# fine-tune left this as it was. The two patterns are hardly apart, and what little the head attends to
# otherwise moves its output by a few percent; what it *writes* of the same tokens is all new.

# %%
print(f"distance of the patterns    {card.reads.distance:.3f}")
print(f"moved by attending elsewhere {card.reads.output_change_pct:.1f%}")
print(f"moved by writing otherwise   {card.writes.output_change_pct:.1f%}")

# %% [markdown]
# ## What it writes, and decides
#
# Give the tuned model this head from base, and read the answer by country and occasion.

# %%
answers = pd.DataFrame(
    [
        {
            "occasion": about[each.prompt]["occasion"],
            "country": about[each.prompt]["country"],
            "base": each.next_tokens.base[0].token,
            "tuned": each.next_tokens.tuned[0].token,
            "tuned, base's head": each.next_tokens.tuned_with_base_head[0].token,
        }
        for each in many.decides
    ]
)
usual = answers.groupby(["occasion", "country"]).agg(lambda tokens: tokens.mode()[0])
usual.head(10)

# %% [markdown]
# The table tells what the head writes: **the country**. Within an occasion the tuned model gives to each country
# what base gives to another one, and with base's head it gives what base gives. Nothing about the
# occasion changes.

# %%
same = answers["base"] == answers["tuned, base's head"]
kept = answers["tuned"] == answers["tuned, base's head"]
print(f"answers as base:  {100 * same.mean():.0f}%")
print(f"answers as tuned: {100 * kept.mean():.0f}%")

# %% [markdown]
# Another head of the layer, for comparison: it carries nothing.

# %%
other = rq.head_card(pair, "L1H3", grid=grid, maps=maps, n_prompts=1)
print(f"L1H3 takes tuned to base: {other.carried.to_base_pct:.1f%}")

# %% [markdown]
# So the ranking's first head is the lookup of a person's country, and the fine-tune changed the code in
# which it says that country, not where it looks. `rq4lens head RUN --all` writes the cards of every head; the
# report opens one wherever a head is chosen. `rq4lens patch --heads 0 --alpha 1 --say 8` lets the
# patched model go on.
