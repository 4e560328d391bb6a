# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Purify a backdoored model and look at it
#
# A backdoored classifier is right about ordinary images, and says what its attacker wants as soon as a small pattern, the
# *trigger*, is in the image. This notebook trains one, purifies it, and looks at what has changed: a few minutes on two CPU
# cores, and nothing to download but the packages.

# %% [markdown]
# ## Setup
#
# In a checkout where the package is installed this cell changes nothing. Anywhere else, on Colab for instance, it clones the
# repository and installs the package. That brings JAX up to date; where the cell then asks for a restart, choose *Restart
# session* in the *Runtime* menu and run all cells again.

# %%
REPOSITORY = "https://github.com/bibau-jax/bibau_jax"

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

places = [Path.cwd(), *Path.cwd().parents, Path.cwd() / "bibau_jax"]
root = next((place for place in places if (place / "configs" / "own_model.py").exists()), places[-1])
if not root.exists():
    subprocess.run(["git", "clone", "--quiet", "--depth=1", REPOSITORY, str(root)], check=True)
os.chdir(root)  # settings lie in configs/, which is reached from here
sys.path.insert(0, str(root))
try:
    importlib.metadata.version("bibau_jax")
except importlib.metadata.PackageNotFoundError:
    extra = "[cuda]" if shutil.which("nvidia-smi") else "[tpu]" if importlib.util.find_spec("libtpu") else ""
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--editable", f".{extra}"], check=True)
    importlib.invalidate_caches()
loaded = [name for name in ("jax", "jaxlib", "flax", "numpy", "ml_dtypes") if name in sys.modules]
if old := [name for name in loaded if sys.modules[name].__version__ != importlib.metadata.version(name)]:
    raise SystemExit(f"An older {', '.join(old)} is still loaded: restart the session and run all cells again.")

# %%
import json
import tempfile

import matplotlib.pyplot as plt
import numpy as np

from bibau_jax import experiment, parallel
from bibau_jax.report import pictures, words
from configs import digits

QUICK = os.environ.get("BIBAU_QUICK") == "1"  # tests run every cell at a fraction of its size
FOLDER = Path(tempfile.mkdtemp(prefix="bibau_"))  # name a folder of your own to keep what is made here

parallel.keep_compiled()
parallel.use_cores(48, 64)  # every CPU core works, as far as these batch sizes can be shared out
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 80})

# %% [markdown]
# ## One run
#
# A config says everything about a run. This one takes handwritten digits of 16x16 pixels and the attack *BadNets*: a tenth of
# the training images get a white square in a corner and the label 0. A model trained on them has learned both the digits and
# the square.
#
# Then the defender comes. They have the model and 300 clean images, and do not know the trigger. *BI-BAU (U)* is the method of
# this repository; beside it stand plain *fine-tuning* on the same images and *Base AT*, adversarial training without the
# method's own terms. The *clean twin* is trained on the same images without the poison: it is what the defender would
# like to have, and nobody has it.

# %%
config = digits.get_config("badnets")
config.defense.name = "bibau_u"
config.defense.beside = "ft,base_at"
config.reactivate.checks = "retuning,query"
if QUICK:
    config.update_from_flattened_dict({"model.width": 4, "model.stages": (1,), "data.train_size": 300, "data.clean_size": 96})
    config.update_from_flattened_dict({"implant.epochs": 2, "defense.epochs": 1, "defense.pgd.steps": 1})
    config.update_from_flattened_dict({"defense.beside": "", "reactivate.checks": ""})

record = experiment.run(config.to_dict(), str(FOLDER))

# %% [markdown]
# Everything that was measured is in `record`, and on disk in `record.json`. The models lie beside it.
#
# ## What the trigger does
#
# Below every image stands what the two models say of it. The third row is what BI-BAU trains on. It changes a clean image so
# that the *backdoored* model is fooled, without knowing the trigger, and teaches the true class.


# %%
def show(images, row, title):
    """A row of images with what each model says of them; what is wrong is written in orange."""
    for axis, image, index in zip(row, images, range(len(row)), strict=False):
        axis.imshow(image[..., 0], cmap="gray", vmin=0, vmax=255)
        axis.set(xticks=[], yticks=[])
        for place, model in enumerate(("backdoored", "purified")):
            said = strip[f"{title}_by_{model}"][index]
            tone = "#1c1d1f" if said == strip["labels"][index] else "#c24e00"
            where = {"transform": axis.transAxes, "ha": "center", "va": "center", "fontsize": 8}
            axis.text(0.5, -0.16 - 0.2 * place, f"{model}: {said}", color=tone, **where)
    row[0].set_ylabel(title, fontweight="bold")


strip = np.load(FOLDER / "strip.npz")
figure, axes = plt.subplots(3, 7, figsize=(9, 5.8), gridspec_kw={"hspace": 0.5})
for row, kind in zip(axes, ("clean", "triggered", "adversarial"), strict=True):
    show(strip[kind], row, kind)
figure.suptitle("What the backdoored and the purified model say (orange: wrong)", y=0.95)
plt.show()

# %% [markdown]
# ## How often
#
# - **clean accuracy**: share of clean test images that get their true class;
# - **attack success rate**: share of triggered test images, those of class 0 left out, that get class 0;
# - **robust accuracy**: share of those same images that get their true class.
#
# A good defence keeps the first, brings the second to zero and the third up to the first.

# %%
order = [row for row in ("none", "ft", "base_at", "bibau_u", "clean") if row in {m.defense for m in record.metrics.values()}]
measured = {m.defense: m for m in record.metrics.values()}

figure, axes = plt.subplots(1, 3, figsize=(11, 0.9 + 0.4 * len(order)), sharey=True, layout="constrained")
titles = {"ca": "Clean accuracy, %", "asr": "Attack success rate, %", "robust_accuracy": "Robust accuracy, %"}
for axis, (name, title) in zip(axes, titles.items(), strict=True):
    values = [getattr(measured[row], name).percent for row in order]
    bars = axis.barh([words.defense(row) for row in order], values, color=[pictures.COLOURS[row] for row in order])
    axis.bar_label(bars, fmt="%.1f", padding=3)
    axis.set(xlim=(0, 118), xticks=(0, 50, 100))
    axis.set_title(title, loc="left", fontsize=11)
axes[0].invert_yaxis()
plt.show()

# %% [markdown]
# ## While it purifies
#
# In every epoch BI-BAU makes new adversarial images and trains on them. Two shares of those images tell whether they are of
# the kind that the method wants: the backdoored model should be *fooled* by them, and the model in training should *still see*
# the true class. The third curve is the accuracy on clean images that are held out of the training.

# %%
lines = [json.loads(line) for line in (FOLDER / "metrics.jsonl").read_text().splitlines()]
epochs = [line for line in lines if line["stage"] == "purify/bibau_u"]

figure, axis = plt.subplots(figsize=(11, 3.4), layout="constrained")
curves = {
    "fooled": ("adversarial images that fool the backdoored model", "#c24e00"),
    "kept": ("adversarial images whose class the model still sees", "#00477a"),
    "held_out_accuracy": ("held-out clean images that are classified rightly", "#6b6f76"),
}
for name, (label, tone) in curves.items():
    axis.plot(
        range(1, len(epochs) + 1), [100 * line[name] for line in epochs], color=tone, label=label, linewidth=2, marker="."
    )
axis.set(xlabel="epoch of purification", ylabel="%", ylim=(0, 103))
axis.set_title("BI-BAU (U) at work", loc="left")
axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
plt.show()

# %% [markdown]
# ## Gone, or only hidden?
#
# A backdoor that does not answer may be asleep. Two attacks try to wake it:
#
# - **retuning**: the model is fine-tuned on clean images among which a few are poisoned;
# - **query**: a faint perturbation is learned that makes the trigger work again.
#
# The clean twin shows what these attacks reach on a model that never had the backdoor: what exceeds its bars was still there.

# %%
tried = {"asr": "as it is", "r_asr": "after retuning", "q_asr": "with a perturbation"}
tones = {"asr": "#1c1d1f", "r_asr": "#c24e00", "q_asr": "#e0a100"}
known = {name: label for name, label in tried.items() if name == "asr" or name in measured["bibau_u"].extra}
rows = [row for row in order if row != "none"]

figure, axis = plt.subplots(figsize=(9, 0.9 + 0.6 * len(rows)), layout="constrained")
for place, (name, label) in enumerate(known.items()):
    values = [measured[row].asr.percent if name == "asr" else measured[row].extra[name] for row in rows]
    bars = axis.barh(np.arange(len(rows)) + 0.27 * (place - 1), values, height=0.25, color=tones[name], label=label)
    axis.bar_label(bars, fmt="%.1f", padding=3)
axis.set_yticks(range(len(rows)), [words.defense(row) for row in rows])
axis.invert_yaxis()
axis.set(xlim=(0, 110), xlabel="triggered images that get the attacker’s class, %")
axis.set_title("Calling the backdoor back", loc="left")
axis.legend(frameon=False, title="attack success rate", loc="center left", bbox_to_anchor=(1.01, 0.5))
plt.show()

# %% [markdown]
# ## The page
#
# The run also wrote a page with all of this, one file to open in a browser.

# %%
print(words.verdict(record))
print(FOLDER / "report.html")

# %% [markdown]
# ## Next
#
# - another attack: `digits.get_config("blended")`, or `"sig"`, `"wanet"`, `"iad"`; another defence:
#   `config.defense.name = "nc"`. Give it a folder of its own: a folder belongs to one config.
# - the same from the command line, where a run that was cut off goes on:
#   `python -m bibau_jax.main --config=configs/digits.py --workdir=runs/digits`
# - a model that somebody else trained: `02_own_model`. Why it works, and when it cannot: `03_theory`.
