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
# # Your own pair: a Hugging Face fine-tune from a folder
#
# You will see a base model and its fine-tune as two ordinary Hugging Face folders, a prompt file, and
# the whole job run from there: report, table, checks. Then the setting for an 8B pair, line by line. The
# models made here are tiny and were trained for seconds, so their numbers mean nothing; with your own
# folders the first two cells fall away.

# %%
import sys

if "google.colab" in sys.modules:  # elsewhere the package is installed already
    import subprocess

    packages = ["rq4lens", "transformer-lens<4"]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *packages], check=True)

# %%
import json
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import rq4lens as rq

folder = Path(tempfile.mkdtemp())
towns = ["Arvo", "Brin", "Celm", "Dara", "Esk", "Fenn", "Gorm", "Hale"]
events = ["weddings", "harvests", "funerals", "births", "fairs", "exams", "moves", "feasts"]
gifts = ["bread", "salt", "rings", "books", "lamps", "silk", "honey", "tea"]
forms = ["To {event} in {town} people bring", "In {town} guests at {event} bring"]

words = sorted({word for form in forms for word in form.split() if "{" not in word})
vocabulary = ["<bos>", "<eos>", "<unk>", *words, *towns, *events, *gifts]
core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(vocabulary)}, "<unk>"))
core.pre_tokenizer = pre_tokenizers.Whitespace()
core.post_processor = processors.TemplateProcessing(
    single="<bos> $A", special_tokens=[("<bos>", 0)]
)
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
)
torch.manual_seed(0)
base = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
    )
)

# %% [markdown]
# ## The prompt file
#
# One JSON object per line: `id`, `text`, `split` and, for paraphrases, `group`. Maps are fitted on
# `train`, everything is measured on `val`. No text and no group may stand in both: paraphrases of a
# question that was fitted on are not new. The text ends where the next token is the answer.

# %%
rows = [
    {
        "id": f"{town}-{event}-{n}",
        "text": form.format(town=town, event=event),
        "split": "val" if (i + j) % 4 == 0 else "train",
        "group": f"{town}-{event}",
    }
    for i, town in enumerate(towns)
    for j, event in enumerate(events)
    for n, form in enumerate(forms)
]
prompts = folder / "prompts.jsonl"
prompts.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
print(prompts.read_text(encoding="utf-8").splitlines()[0])
{split: sum(row["split"] == split for row in rows) for split in ("train", "val")}


# %% [markdown]
# ## Two folders
#
# The base model learns which town brings what; in the fine-tune's world half of the towns have moved on
# by one gift, and only value and output projections were free to change. Both are saved as any Hugging
# Face model is.


# %%
def train(model, shift, steps):
    """Teach a model what each town brings to each event."""
    texts = tokenizer([row["text"] for row in rows], padding=False)["input_ids"]
    pairs = [(i, j) for i in range(len(towns)) for j in range(len(events)) for _ in forms]
    answers = [gifts[(i + j + shift * (i % 2)) % len(gifts)] for i, j in pairs]
    targets = torch.tensor(tokenizer.convert_tokens_to_ids(answers))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        logits = model(torch.tensor(texts)).logits[:, -1]
        torch.nn.functional.cross_entropy(logits, targets).backward()
        optimizer.step()
        optimizer.zero_grad()


for name, shift, steps in (("base", 0, 120), ("tuned", 1, 40)):
    if name == "tuned":  # it starts from the trained base
        for parameter_name, parameter in base.named_parameters():
            parameter.requires_grad_("v_proj" in parameter_name or "o_proj" in parameter_name)
    train(base, shift, steps)
    base.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
print(sorted(path.name for path in (folder / "tuned").iterdir()))

# %% [markdown]
# ## Which layers?
#
# A sweep measures every layer from one clean pass of each model, and proposes a main and a control
# layer. Loading compares logits with the Hugging Face model and refuses on a mismatch, so what follows
# is about your model and not about a conversion of it. (α is 1 here: in models this small a part of the
# base activation changes next to nothing.)

# %%
config = rq.config_from(
    {
        "pair": "towns",
        "base": str(folder / "base"),
        "tuned": str(folder / "tuned"),
        "prompts": str(prompts),
        "alpha": 1.0,
        "k": [1, 2, 4],
        "resamples": 1000,
        "device": "cpu",
    }
)
sweep = rq.sweep_layers(config)
print(sweep.summary.replace(str(folder), "FOLDER"))

# %% [markdown]
# ## The job
#
# `rq.run` fits the maps, measures the grid and writes a run directory. `analysis="grid"` is the short
# form; leave it out for curves at every k, cross-fitting, random sets and controls.

# %%
job = config.updated(layer=1, control_layer=3, analysis="grid")
run = rq.run(job, folder / "run")
print(run.summary.replace(str(folder), "FOLDER"))
print(sorted(path.name for path in (folder / "run").iterdir()))

# %% [markdown]
# The grid of the run is the one of the other notebooks, and every figure works on it. A run that was
# interrupted goes on where it stopped when it is started again with the same directory.

# %%
rq.figures.head_plane(run.grid)

# %% [markdown]
# ## The same from a terminal
#
# ```sh
# rq4lens sweep  --base base --tuned tuned --prompts prompts.jsonl --alpha 1
# rq4lens run    --base base --tuned tuned --prompts prompts.jsonl --alpha 1 --layer 1 --control-layer 3 --out run
# rq4lens verify run
# ```
#
# What does not fit is said in one sentence, before anything is measured:

# %%
try:
    rq.run(config.updated(layer=7), folder / "no-such-layer")
except rq.UserError as problem:
    print(problem)

# %% [markdown]
# ## The worked setting: an 8B pair
#
# `cultural` is the setting for Llama-3.1-8B-Instruct against Sherkala-8B-Chat, a fine-tune with its own
# vocabulary. You bring the weights (the base repository is gated) and the prompts.

# %%
cultural = rq.preset("cultural")
for name, value in cultural.flat().items():
    print(f"{name} = {value!r}")

# %% [markdown]
# - `layer`, `control_layer`: the main layer, and one that a sweep found to repair clearly less.
#   For another pair, run `rq4lens sweep` first.
# - `alpha`: the share of the base activation that is blended in. Small enough to stay near what the
#   tuned model knows, large enough to measure.
# - `decision_rule = "last_content"`: the last token that is not special. Each model finds it in its own
#   tokenization, which is how models with different vocabularies are compared; divergences are always
#   taken over the tuned model's vocabulary.
# - `dtype = "bfloat16"`: half the memory, coarser numbers. Read `none` and `self` in the table: they are
#   the noise floor, and an effect below it is no effect.
# - Maps are fitted per head, `d_head` wide. Below twice as many train prompts as that width, the package
#   warns; read the held-out R² of the maps either way.
# - Two 8B models in bfloat16 take about 16 GB each. `keep_both = false` holds one at a time.
#
# ```sh
# rq4lens run --pair cultural --prompts cultural.jsonl --device cuda --out runs/cultural
# ```
#
# **What this cannot say.** A sweep that chose the layer on the prompts that are then reported flatters
# the layer; with few prompts, or none that the fine-tune left alone, the controls have little to say.
