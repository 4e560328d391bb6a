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
# # Bring your own model
#
# Somebody gave you an image classifier. Is there a backdoor in it, a pattern that makes it say what its maker wants? This
# notebook reads its file, scans it, purifies it, verifies the result and gives it back in the format that it came in. It
# begins by making a suspicious model of its own, so that it can be run as it stands, in a few minutes on two CPU cores.

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
import tempfile

import matplotlib.pyplot as plt
import numpy as np

from bibau_jax import experiment, own, parallel, train, workdir
from bibau_jax.importers import export, rules, torch_file
from bibau_jax.report import words
from configs import digits

QUICK = os.environ.get("BIBAU_QUICK") == "1"  # tests run every cell at a fraction of its size
FOLDER = Path(tempfile.mkdtemp(prefix="bibau_"))  # name a folder of your own to keep what is made here

parallel.keep_compiled()
parallel.use_cores(48, 64)  # every CPU core works, as far as these batch sizes can be shared out
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 80})

# %% [markdown]
# ## The suspect
#
# To have something to purify, we play the attacker first: a ResNet learns handwritten digits, a tenth of which carry a white
# square and the label 0. It is written to `suspect.pth` under the names that PyTorch gives to its parameters, as if somebody
# had sent it. The digits' test images, which it was not trained on, become our clean images.

# %%
attacker = digits.get_config("badnets")
attacker.stages = "implant"
attacker.implant.clean_twin = "none"
if QUICK:
    attacker.update_from_flattened_dict({"model.width": 8, "model.stages": (1,), "data.train_size": 600, "implant.epochs": 20})

experiment.run(attacker.to_dict(), str(FOLDER / "attacker"))
theirs = experiment.Run(workdir.read_config(FOLDER / "attacker"), FOLDER / "attacker")
variables, _, _ = experiment.load_model(theirs, "implant")
export.write(FOLDER / "suspect.pth", rules.named(variables))

test = theirs.dataset.test.take(slice(0, 120 if QUICK else None))
np.savez(FOLDER / "clean.npz", images=test.images, labels=test.labels)

# %% [markdown]
# ## Bring it in
#
# **Replace these two paths by yours.** The first is a file of weights: `.pth`, `.pt`, `.tar` or `.safetensors`. Nothing in it
# is executed, and PyTorch is not needed. The second holds 100 to 5,000 clean images whose classes are known: a folder with one
# subfolder a class, or an `.npz` file with `images` (uint8, number x height x width x channels) and `labels`.
#
# The network is told by the names and shapes in the file, and how its pixels are scaled by trying the usual scalings on the
# clean images. So for your own model take `settings = {}`. The settings below are needed because digits are not photographs:
# a shortened ResNet-18 looks like a ResNet-20, the scaling is an unusual one, and so few small images need other steps.

# %%
WEIGHTS = FOLDER / "suspect.pth"
IMAGES = FOLDER / "clean.npz"

settings = {
    "model.name": "resnet18",
    "model.normalisation": "given",
    "model.mean": (0.305,),
    "model.std": (0.376,),
    "data.padding": 1,
    "scan.epochs": 60,
    "scan.batch_size": 48,
    "defense.epochs": 30,
    "defense.batch_size": 48,
    "defense.learning_rate": 0.1,
    "defense.lambda_kd": 0.03,
    "defense.lambda_iewc": 5.0,
    "reactivate.retuning.images": 256,
    "reactivate.query.images": 100,
    "reactivate.query.epochs": 20,
    "reactivate.query.hidden": 256,
}
if QUICK:
    settings |= {"scan.epochs": 2, "defense.epochs": 1, "defense.pgd.steps": 1, "reactivate.retuning.repeats": 1}
    settings |= {"reactivate.retuning.images": 48, "reactivate.retuning.epochs": 1, "reactivate.query.epochs": 1}

model = own.bring_in(WEIGHTS, IMAGES, workdir=FOLDER / "mine", **settings)

# %% [markdown]
# Every step below leaves its work in `workdir`. A step that is done is not done again.
#
# ## Scan
#
# For every class the scan looks for the smallest patch that turns images of the other classes into this one. A backdoor is a
# shortcut: the patch of its class is much smaller than the others. How far a class stands out is its *anomaly index*. A class
# is flagged where the index passes 2 and the patch is at most half as large as the median.

# %%
found = model.scan()
arrays = np.load(FOLDER / "mine" / "scan" / "triggers.npz")
flagged = set(found["flagged"])
tones = ["#c24e00" if label in flagged else "#6b6f76" for label in range(len(found["indices"]))]

figure = plt.figure(figsize=(11, 4.2), layout="constrained")
grid = figure.add_gridspec(2, len(tones), height_ratios=(1, 1.6))
for label, (mask, pattern) in enumerate(zip(arrays["masks"], arrays["patterns"], strict=True)):
    axis = figure.add_subplot(grid[0, label])
    picture = mask * pattern + (1 - mask) * 128  # grey where the patch leaves the image alone
    axis.imshow(np.clip(picture, 0, 255).astype(np.uint8).squeeze(), cmap="gray", vmin=0, vmax=255)
    axis.set(xticks=[], yticks=[])
    axis.set_title(f"{label}: {found['sizes'][label]:.0f} px", fontsize=10, color=tones[label])
axis = figure.add_subplot(grid[1, :])
heights = [max(index or 0.0, 0.0) for index in found["indices"]]  # below 0: a larger patch than most; None: no patch found
bars = axis.bar(range(len(tones)), heights, color=tones)
axis.bar_label(bars, fmt="%.1f", padding=2)
axis.axhline(2, color="#1c1d1f", linestyle=":", linewidth=1)
axis.text(len(tones) - 0.5, 2, " suspicious above", va="bottom", ha="right", fontsize=9)
axis.set(xlabel="class", ylabel="anomaly index", xticks=range(len(tones)), ylim=(0, max(3, 1.2 * max(heights))))
figure.suptitle("The smallest patch that leads to each class (grey: left as it is), and how far it stands out")
plt.show()
print("flagged:", sorted(flagged) or "none")

# %% [markdown]
# ## Purify and verify
#
# `purify` runs BI-BAU (U), which needs neither the trigger nor the attacker's class. Where a class stands out in the scan, half
# of its adversarial images are aimed at it; the other half does not depend on the scan, which may be wrong.
# `verify` then measures on clean images that were held out: accuracy, the scan again, and how often a patch that stands in for
# the trigger works, as it is and after two attempts to wake the backdoor. That patch is inverted once more, to work on the
# model as it came and on a fine-tuned copy of it: what the scan finds is in part a quirk that any training takes away.

# %%
model.purify()
record = model.verify()

# %%
before, after = words.backdoored(record), words.purified(record)
bars = {
    "clean accuracy\nas it came": (before.ca.percent, "#6b6f76"),
    "clean accuracy\npurified": (after.ca.percent, "#00477a"),
    "patch works\nas it came": (before.extra["stand_in_asr"], "#6b6f76"),
    "patch works\npurified": (after.extra["stand_in_asr"], "#00477a"),
    "patch works\npurified, then retuned": (after.extra["stand_in_r_asr"], "#4a9ad4"),
    "patch works\npurified, with a perturbation": (after.extra["stand_in_q_asr"], "#4a9ad4"),
}
figure, axis = plt.subplots(figsize=(11, 3.6), layout="constrained")
drawn = axis.bar(list(bars), [value for value, _ in bars.values()], color=[tone for _, tone in bars.values()])
axis.bar_label(drawn, fmt="%.1f", padding=2)
axis.set(ylim=(0, 112), ylabel="% of held-out images")
axis.tick_params(axis="x", labelsize=8)
axis.set_title("Before and after", loc="left")
plt.show()
print(model.verdict)

# %% [markdown]
# ## The real trigger
#
# As a rule nobody knows it. Here we do, because we made it: what does it do to both models? This cell also shows how to get
# at the purified network in Python. For a model of a stranger it is left out.

# %%
mine = experiment.Run(workdir.read_config(FOLDER / "mine"), FOLDER / "mine")
held_out = mine.measured
triggered = theirs.attack.stamp(held_out.images, held_out.ids)

figure, axes = plt.subplots(1, 8, figsize=(11, 2.3))
for place, (name, stage) in enumerate({"as it came": "implant", "purified": "purify/bibau_u"}.items()):
    weights, _, _ = experiment.load_model(mine, stage)
    said = train.predict(mine.classifier, weights, triggered)
    others = held_out.labels != 0
    print(f"{name}: {np.sum(said[others] == 0)} of {others.sum()} triggered images are called 0")
    for axis, index in zip(axes, np.flatnonzero(others), strict=False):
        axis.imshow(triggered[index, ..., 0], cmap="gray", vmin=0, vmax=255)
        axis.set(xticks=[], yticks=[])
        tone = "#c24e00" if said[index] == 0 else "#1c1d1f"
        where = {"transform": axis.transAxes, "ha": "center", "va": "center", "fontsize": 9}
        axis.text(0.5, -0.14 - 0.17 * place, f"{name}: {said[index]}", color=tone, **where)
figure.suptitle("Triggered images and what the models say of them (orange: the attacker’s class)", y=0.88)
plt.show()

# %% [markdown]
# ## Back to PyTorch
#
# `export` writes the purified weights under the names, in the layouts and types that they came with, and a card beside them.
# In PyTorch `model.load_state_dict(safetensors.torch.load_file(path))` takes them as it took the suspect's.

# %%
path = model.export()
came, back = torch_file.read(WEIGHTS), torch_file.read(path)
kinds = [{name: (array.shape, array.dtype) for name, array in file.arrays.items()} for file in (came, back)]
print(path)
print(f"{len(back.arrays)} arrays; names, shapes and types as they came: {kinds[0] == kinds[1]}")
print(model.report())

# %% [markdown]
# The last line is a page with the verdict, the numbers, the patches, and what is *not* known. Read the last part before you
# deploy anything: the scan finds patches that look alike on every image, and other triggers may pass it unseen.
#
# The same from the command line:
# `python -m bibau_jax.main --config=configs/own_model.py --workdir=runs/mine --config.model.weights=suspect.pth
# --config.data.folder=clean/`. A network that is not told by its keys is one file; see `examples/small_vgg.py`.
