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
# # Quickstart: the pair in the box
#
# You will see the whole run in a few cells: load a base model and its fine-tune, fit a map per head,
# patch every head of one layer, and read off which of them carry what the fine-tune changed. Everything
# runs on a laptop in seconds; nothing is downloaded.

# %%
import sys

if "google.colab" in sys.modules:  # elsewhere the package is installed already
    import subprocess

    packages = ["rq4lens", "transformer-lens<4"]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *packages], check=True)

# %%
import rq4lens as rq

pair = rq.load_pair("etiquette")
print(pair.n_layers, "layers of", pair.n_heads, "heads")
print(pair.prompts.split("val").texts[0])

# %% [markdown]
# The prompt ends before the item; the fine-tune changed what people of some countries bring. Maps are
# fitted on the train prompts, from base `hook_z` to tuned `hook_z` at the decision token.

# %%
maps = rq.fit_maps(pair, layers=[1, 2])
print(f"held-out CKA of the maps of layer 1: {maps[1].mean_cka:.3f}")

# %% [markdown]
# The grid: all heads, each head, top-k against random-k, the control layer, and two checks that must
# read 0. Raw and mapped, on the validation prompts.

# %%
run = rq.run_grid(pair, maps, layer=1, control_layer=2, alpha=0.3)
full = run.full
print(f"all heads: raw {full.KL_raw:.4f}, mapped {full.KL_mapped:.4f}, ΔKL {full.delta:.4f} nats")
print("best heads:", [run.label(head) for head in run.ranking.top(4)])
print("patching nothing:", run["none"].KL_raw)

# %% [markdown]
# Coverage is the share of the whole layer's `ΔKL` that a few heads reach by themselves. The best two
# carry most of it; the random sets of two come nowhere near.

# %%
share = {
    name: 100 * run[name].delta / full.delta for name in ("top1", "top2", "rand2_s0", "rand2_s1")
}
print({name: f"{value:.1f}%" for name, value in share.items()})

# %% [markdown]
# Every figure is a plotly figure that states how it was made. In your own notebook it is interactive.

# %%
rq.figures.coverage_curve(run)

# %% [markdown]
# `rq.run(...)` and `rq4lens run` do all of this in one step and write a report. Next: how far the
# ranking can be trusted (notebook 2), and every definition in `docs/method.md`.
