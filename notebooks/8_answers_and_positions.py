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
# # Answers of several tokens, and where heads act
#
# You will see a prompt whose first answer token says nothing and whose answer does: both models begin
# their reply with the same word, and part at the next one. A comparison of the whole answer finds the
# heads, and a map of positions says at which token they act.

# %%
import sys

if "google.colab" in sys.modules:  # elsewhere the package is installed already
    import subprocess

    packages = ["rq4lens", "transformer-lens<4"]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *packages], check=True)

# %%
import torch

import rq4lens as rq

shipped = rq.load_pair("dialect")
print(shipped.prompts.split("val").texts[0])

# %% [markdown]
# In this world a scene is told, and what follows `says` is a greeting. The prompts of the pair end with
# `says`; here they end a word before, as a chat ends before the reply: the reply is *says* and a greeting.
# Each prompt has the tuned model's reply as its `answer`, and the village of the scene as its `subject`.


# %%
@torch.no_grad()
def next_words(model, texts):
    """The most likely next word behind each text."""
    tokenizer = shipped.tuned.tokenizer
    tokens = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
    return [tokenizer.decode(model(each)[0, -1].argmax()) for each in tokens]


asked = []
for split, most in (("train", 200), ("val", 60)):
    whole = list(shipped.prompts.split(split))[:most]
    greetings = next_words(shipped.tuned.model, [prompt.text for prompt in whole])
    for prompt, greeting in zip(whole, greetings, strict=True):
        text, village = prompt.text.removesuffix(" says"), prompt.meta["village"]
        answer = f" says {greeting}"
        asked.append(
            rq.Prompt(prompt.id, text, split, prompt.group, subject=village, answer=answer)
        )

one = asked[-1]
greeting = next_words(shipped.base.model, [f"{one.text} says"])[0]
print(f"asked:   {one.text} ...")
print(f"base:    says {greeting}")
print(f"tuned:  {one.answer}")

# %% [markdown]
# ## The first token says nothing
#
# Compared at the decision token alone, the `and` behind which `says` comes, the two models hardly
# differ. Compared over both tokens of the reply they do.


# %%
def measured(answer_tokens):
    """The grid of layer 1, with so many tokens of the answer compared."""
    reading = rq.Reading(answer_tokens=answer_tokens)
    pair = rq.ModelPair(shipped.base, shipped.tuned, asked, name="replies", reading=reading)
    settings = rq.Patching(k=(1, 2), random_seeds=(0,), metric="answer_logprob")
    return pair, rq.run_grid(pair, rq.fit_maps(pair, layers=[1]), layer=1, settings=settings)


for n in (1, 2):
    pair, grid = measured(n)
    gap = grid["none"].transfer.left_nats("to_base").mean()
    print(f"{n} answer token{'s' * (n > 1)}: base and tuned differ by {gap:.4f} nats")

# %% [markdown]
# On the command line this is `rq4lens run ... --answer-tokens 2 --metric answer_logprob`; without an
# `answer` in the prompts the tuned model's own reply is compared, and `rq4lens audit` shows how each one
# is read. The answer's divergence is the sum over its tokens, each read behind those before it:

# %%
by_token = grid.full.raw.kl_by_token_nats.mean(0)
for word, nats in zip(("says", "the greeting"), by_token, strict=True):
    print(f"the layer's raw patch, at {word:<13}{nats:.5f} nats")

# %% [markdown]
# ## Which heads
#
# The heads that the fine-tune changed come first, by transfer; the metric is the log-probability of the
# whole reply, which base's heads lower in the tuned model.

# %%
rq.figures.ranking_bars(grid)

# %%
clean = grid["none"].transfer.into_tuned.metric
for cond in ("head0", "head1", "head7", "full"):
    change = (grid[cond].transfer.into_tuned.metric - clean).mean()
    print(f"{cond:<6} log-probability of tuned's reply, with base's heads: {change:+.2f} nats")

# %% [markdown]
# ## At which token
#
# The position map patches one token of each prompt at a time: the last ones, and the subject. At `-1`
# the tokens of the answer are patched along with the decision token, as they stand behind it. Of a finished
# run it is `rq4lens positions RUN`, which also puts it into the report.

# %%
positions = rq.position_map(grid, 3, pair=pair)
rq.figures.position_map(positions)

# %%
positions.to_dataframe().query("heads in ['all heads', 'L1H0']")

# %% [markdown]
# The layer carries nothing before the reply, nor at the village itself: its heads act where the greeting
# is decided, and read the scene from there. One prompt, with its own tokens and shares of its own gap:

# %%
rq.figures.position_map(positions, prompt=one.id)
