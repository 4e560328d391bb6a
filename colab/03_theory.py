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
# # The theory on small networks
#
# Why does unlearning a backdoor cost clean accuracy, and when can it be complete? The paper answers with the theory of
# *continual learning*: tasks that are learned one after the other and disturb each other. This notebook computes its notions
# on networks small enough to see them, in a few minutes on two CPU cores.

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

from bibau_jax import attacks, data, experiment, keys, models, parallel, train, workdir
from bibau_jax.data import ImageSet
from bibau_jax.report import words
from bibau_jax.stages import checks
from bibau_jax.theory import (
    complete_unlearning,
    drift,
    flow,
    linearize,
    measure,
    ntk,
    orthogonality,
    overlap,
    path,
    products,
    task_stream,
    three_tasks,
    trajectory,
    widths,
)
from configs import digits

QUICK = os.environ.get("BIBAU_QUICK") == "1"  # tests run every cell at a fraction of its size
FOLDER = Path(tempfile.mkdtemp(prefix="bibau_"))  # name a folder of your own to keep what is made here
CLEAN, BACKDOOR, UNLEARNING, GREY = "#00477a", "#c24e00", "#00785a", "#6b6f76"

parallel.keep_compiled()
parallel.use_cores(1)  # one device: many small programs gain nothing from more
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 60, "font.size": 10})

# %% [markdown]
# ## 1. The tangent kernel
#
# Move the weights a little so that the network's answer to one image changes: by how much does its answer to another image
# change too? The *neural tangent kernel* (NTK) holds these numbers for all pairs of images: inner products of the gradients
# of the outputs with respect to the weights. Two images with a large entry are learned, and forgotten, together.
#
# A small network, and five kinds of digits: clean ones to train on, unseen clean ones, triggered ones (a white square in a
# corner) to train on and unseen ones, and clean ones with their pixels shuffled, which share no content with anything.

# %%
COUNT = 6 if QUICK else 20
images, tasks, rows = widths.inputs(0, clean=COUNT, triggered=COUNT)
images = np.concatenate([images, overlap.shuffled(images[rows["clean"]])])
rows["shuffled"] = np.arange(len(images) - COUNT, len(images))


def network(width):
    """A classifier and its variables at the start, running statistics its own."""
    classifier = models.build("resnet18", width=width, **widths.NETWORK)
    fresh = classifier.init(keys.root(0))
    return classifier, path.recalibrated(classifier, fresh, data.load("digits").train.images[:128])


classifier, variables = network(4 if QUICK else 16)
start = train.logits(classifier, variables, images)
kernel = ntk.kernel(classifier, variables, images)
print(f"{len(images)} images with 10 outputs each: a kernel of {kernel.shape[0]} x {kernel.shape[1]}")

# %%
pairs = np.einsum("ikjk->ij", kernel.reshape(len(images), 10, len(images), 10))  # summed over outputs
cosines = pairs / np.sqrt(np.outer(np.diag(pairs), np.diag(pairs)))

figure, axis = plt.subplots(figsize=(6.2, 4.9), layout="constrained")
picture = axis.imshow(cosines, cmap=plt.get_cmap("Blues", 10), vmin=0.5, vmax=1, interpolation="nearest")
middles = [chosen.mean() for chosen in rows.values()]
names = [name.replace("_", "\n") for name in rows]
axis.set_xticks(middles, names, fontsize=9)
axis.set_yticks(middles, names, fontsize=9)
for chosen in list(rows.values())[1:]:
    axis.axhline(chosen[0] - 0.5, color="white", linewidth=1.5)
    axis.axvline(chosen[0] - 0.5, color="white", linewidth=1.5)
figure.colorbar(picture, label="cosine of the gradients")
axis.set_title("Which images share their gradients", loc="left")
plt.show()

# %% [markdown]
# ## 2. Linearised training
#
# Replaced by its tangent at the start, the network can be trained *in closed form*: the kernel tells its outputs after any
# number of steps of gradient descent, and nothing is iterated. How good is that? The line is the closed form, the dots are
# the network itself, trained on the same images with the same steps. The wider the network, the nearer it is to its tangent.

# %%
clean, targets = rows["clean"], tasks[0].targets
own = np.ix_(*[np.concatenate([np.arange(10) + 10 * index for index in clean])] * 2)
of = flow.spectrum(kernel[own])
step_size, times = float(0.5 / of.values[-1]), np.arange(0, 101, 2 if QUICK else 1)


def loss(outputs):
    """Half the squared distance from the targets, mean over images."""
    return float(np.sum((outputs - targets) ** 2) / 2 / len(targets))


told = []
for steps in times:
    coefficients = flow.squared(of, start[clean], targets, time=steps * step_size, step_size=step_size)
    told.append(loss(flow.moved(kernel[own], start[clean], coefficients)))

state, seen = variables, [(0, loss(start[clean]))]
for steps in (10, 20, 40, 60, 80, 100):
    more = {"loss": "squared", "step_size": step_size, "steps": steps - seen[-1][0]}
    state = linearize.descend(classifier, state, images[clean], targets, **more)
    seen.append((steps, loss(train.logits(classifier, state, images[clean]))))

gaps = {}
for width in (4,) if QUICK else (4, 8, 16, 32):
    given = network(width)
    gaps[width] = linearize.gap(*given, images[clean], targets, images[rows["unseen_clean"]], steps=100)

figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.1), layout="constrained")
axes[0].plot(times, told, color=CLEAN, label="closed form")
axes[0].scatter(*zip(*seen, strict=True), color=BACKDOOR, zorder=3, label="the network itself")
axes[0].set(xlabel="steps of gradient descent", ylabel="loss on the training images", ylim=(0, None))
axes[0].set_title("Training, told beforehand", loc="left")
axes[0].legend(frameon=False)
for name, label, style in (("training", "training images", "o-"), ("others", "unseen images", "o:")):
    axes[1].plot(list(gaps), [getattr(gap, name) for gap in gaps.values()], style, color=CLEAN, label=label)
axes[1].set(xscale="log", xlabel="width of the network", ylabel="distance / way of the outputs", ylim=(0, None))
axes[1].set_xticks(list(gaps), map(str, gaps))
axes[1].minorticks_off()
axes[1].set_title("How far it ends from the closed form", loc="left")
axes[1].legend(frameon=False)
plt.show()

# %% [markdown]
# Cross-entropy has no closed form, but its gradient flow can be followed in the outputs alone, step by step, without the
# network. And where a kernel is too large to be held, its products with a vector need no kernel: one pass backward and one
# forward through the network. Conjugate gradients then solve with it.

# %%
labels = targets.argmax(1).astype(np.int32)
followed = flow.cross_entropy(kernel[own], start[clean], labels, time=100 * step_size, step_size=step_size)
predicted = flow.moved(kernel[own], start[clean], followed)
state = linearize.descend(classifier, variables, images[clean], labels, loss="cross_entropy", step_size=step_size, steps=100)
real = train.logits(classifier, state, images[clean])
right = [100 * np.mean(outputs.argmax(1) == labels) for outputs in (start[clean], predicted, real)]
print("training images right: {:.0f} % at the start; trained, {:.0f} % by the kernel, {:.0f} % really".format(*right))

solved = products.solve(classifier, variables, images[clean], targets - start[clean], ridge=0.1 * of.values[-1], tolerance=1e-3)
exact = np.linalg.solve(kernel[own] + 0.1 * of.values[-1] * np.eye(len(own[0])), (targets - start[clean]).reshape(-1))
apart = np.linalg.norm(solved.vector.reshape(-1) - exact) / np.linalg.norm(exact)
print(f"a ridge regression by {solved.steps} products, without the kernel: {100 * apart:.2f} % from that with it")

# %% [markdown]
# ## 3. Drift and forgetting
#
# The paper sees a backdoor as a *second task* that is learned after the clean one, and unlearning as a third. *Drift* is what a
# later task changes in the outputs of images of an earlier one; *catastrophic forgetting* is its squared size. Here the three
# tasks are learned in turn: clean digits with their classes, triggered ones with class 0, the same triggered ones with their
# true classes. The kernel tells beforehand how far each kind of images drifts from the clean model.

# %%
outputs = drift.stream(kernel, start, tasks, time=100 * step_size, step_size=step_size)
states = [variables]
for task in tasks:
    options = {"loss": "squared", "step_size": step_size, "steps": 100}
    states.append(linearize.descend(classifier, states[-1], images[task.rows], task.targets, **options))

figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.0), sharey=True, layout="constrained")
for axis, task, title in zip(axes, (2, 3), ("after the backdoor", "after unlearning"), strict=True):
    for place, chosen in enumerate(rows.values()):
        predicted = drift.catastrophic_forgetting((outputs[task] - outputs[1])[chosen]) / len(chosen)
        moved = drift.drift(classifier, states[1], states[task], images[chosen])
        measured = drift.catastrophic_forgetting(moved) / len(chosen)
        axis.bar(place - 0.2, predicted, width=0.38, color=CLEAN, label="told by the kernel" if place == 0 else None)
        axis.bar(place + 0.2, measured, width=0.38, color=BACKDOOR, label="the network itself" if place == 0 else None)
    axis.set_xticks(range(len(rows)), [name.replace("_", "\n") for name in rows], fontsize=9)
    axis.set_title(f"Drift from the clean model {title}", loc="left")
axes[0].set_ylabel("mean squared drift of the outputs")
axes[0].legend(frameon=False)
plt.show()

# %% [markdown]
# ## 4. Overlap
#
# Are clean task and backdoor task *orthogonal*, as the theory would like? Each task spans a space of gradients. The cosines of
# the angles between two such spaces say how much they share: 1 is a common direction, 0 a foreign one. Two sets of clean
# digits are the ceiling, shuffled pixels the floor.


# %%
def block(one, other):
    """The part of the kernel between two kinds of images."""
    flat = [(rows[name][:, None] * 10 + np.arange(10)).reshape(-1) for name in (one, other)]
    return kernel[np.ix_(*flat)]


figure, axis = plt.subplots(figsize=(7, 3.1), layout="constrained")
for kind, label, tone in (
    ("unseen_clean", "other clean digits", CLEAN),
    ("triggered", "triggered digits", BACKDOOR),
    ("shuffled", "shuffled pixels", GREY),
):
    shared = overlap.overlap(block("clean", "clean"), block(kind, kind), block("clean", kind))
    axis.plot(np.linspace(0, 100, len(shared.cosines)), shared.cosines, color=tone, label=label, linewidth=2)
    print(f"{label}: {100 * shared.energy:.1f} % of the clean task's squared gradients lie in their space")
axis.set(xlabel="share of the directions, %", ylabel="cosine", ylim=(0, 1.02), xlim=(0, 100))
axis.set_title("What the clean task shares with …", loc="left")
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# Read the curves from the left: these are the directions that the tasks share most. If triggered digits lie nearer to the
# ceiling than to the floor, the tasks are far from orthogonal, and learning one moves the other, as the drifts above show.
#
# ## 5. Three tasks, exactly
#
# In a linear model everything can be computed. The *tilt* says how far the backdoor leans towards the clean task: at 0 degrees
# both are orthogonal. What is left of the backdoor depends on the images that unlearning uses. Dots are learned in closed form,
# lines are formulas. Fine-tuning on clean images cannot touch an orthogonal backdoor.

# %%
found = three_tasks.study()
figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.2), sharey=True, layout="constrained")
kinds = {
    "clean": ("fine-tuning on clean inputs", "#8a4b86"),
    "orthogonal": ("inputs orthogonal to the clean task", UNLEARNING),
    "parallel": ("inputs parallel to the backdoor", "#e0a100"),
    "orthogonal_and_clean": ("orthogonal inputs and clean ones", CLEAN),
}
for axis, on in zip(axes, ("clean", "triggered"), strict=True):
    for size, (name, (label, tone)) in zip((90, 50, 25, 8), kinds.items(), strict=True):
        values = found[name]
        axis.plot(values["tilt"], values[f"{on}_predicted"], color=tone)
        axis.scatter(values["tilt"], values[f"{on}_measured"], color=tone, s=size, label=label, zorder=3, clip_on=False)
    axis.plot(values["tilt"], found["nothing"][f"{on}_predicted"], color="#1c1d1f", linestyle=":", label="no unlearning")
    axis.set(xlabel="tilt of the backdoor, degrees", xlim=(0, 90), ylim=(-0.03, 1.06), xticks=range(0, 91, 30))
    axis.set_title(f"What is left on {on} inputs", loc="left")
axes[0].set_ylabel("drift from the clean model\n(1: the whole backdoor)")
axes[1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), title="Unlearning by …")
plt.show()

# %% [markdown]
# ## 6. Is a purified model unlearned completely?
#
# *Complete unlearning* means: the purified model answers as a model that never had the backdoor. Such a model, the clean twin,
# can be trained here, because we have the attacker's data. Of the way that the backdoor moved the outputs away from the twin,
# what share is still left? And layer by layer?

# %%
config = digits.get_config("badnets")
config.stages = "implant"
config.defense.beside = "ft"
if QUICK:
    config.update_from_flattened_dict({"model.width": 4, "model.stages": (1,), "data.train_size": 300, "data.clean_size": 96})
    config.update_from_flattened_dict({"implant.epochs": 2, "defense.epochs": 1, "defense.pgd.steps": 1})

experiment.run(config.to_dict(), str(FOLDER / "run"))
run = experiment.Run(workdir.read_config(FOLDER / "run"), FOLDER / "run")
attack, backdoored = experiment.attack_as_trained(run)
twin, _, _ = experiment.load_model(run, "clean")
states, purified = {}, {}
for row in run.rows:  # and the weights on the way are kept
    states[row], purified[row] = measure.purification(run, row, backdoored, FOLDER / "states" / row)
test = run.measured
test = test.take(np.flatnonzero(attack.aim(test.labels) != test.labels)[: 50 if QUICK else 250])
triggered = attack.stamp(test.images, test.ids)

# %%
figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.2), layout="constrained")
for row, tone in zip(purified, (CLEAN, BACKDOOR), strict=False):
    trio = complete_unlearning.Models(twin, backdoored, purified[row])
    done = complete_unlearning.completeness(*(train.logits(run.classifier, each, triggered) for each in trio))
    print(f"{words.defense(row)}: {done.share:.2f} of the squared drift is left, cosine of the way back {done.cosine:.2f}")
    bar = axes[0].barh(words.defense(row), done.share, color=tone)
    axes[0].bar_label(bar, fmt="%.2f", padding=3)
    layers = complete_unlearning.by_layer(run.classifier, trio, triggered)
    axes[1].plot(range(len(layers)), [each["share"] for each in layers.values()], "o-", color=tone, label=words.defense(row))
for line in (axes[0].axvline, axes[1].axhline):
    line(1, color="#1c1d1f", linestyle=":", linewidth=1)
axes[0].set(xlabel="share left (0: all unlearned, 1: nothing)")
axes[0].margins(x=0.15)
axes[0].invert_yaxis()
axes[0].set_title("Outputs of triggered images", loc="left")
axes[1].set_xticks(range(len(layers)), list(layers), rotation=30, ha="right", fontsize=8)
axes[1].set(ylabel="share left", yscale="log")
axes[1].set_title("The same, layer by layer", loc="left")
axes[1].legend(frameon=False)
plt.show()

# %% [markdown]
# A low attack success rate and complete unlearning are different things. A defence may lead away from the backdoor without
# leading back to the twin: then a share is left. A share above 1 in a layer means that the defence moved what the backdoor had
# hardly touched.
#
# Which way did the weights go? Proposition 4.2 asks that unlearning goes against the learning of the backdoor (180 degrees) and
# square to the clean task (90 degrees), all along.

# %%
stamped = ImageSet(triggered, np.asarray(attack.aim(test.labels), np.int32), test.ids)
towards = trajectory.directions(run.classifier, twin, backdoored, test, stamped)
absolute, signed = orthogonality.orthogonality(run.classifier, backdoored, test, stamped)
print(f"angle between the two tasks' gradients: {signed:.0f} degrees, of their magnitudes {absolute:.0f} degrees")
kinds = {"to_backdoor": ("learning the backdoor", 180), "to_clean": ("learning the clean task", 90)}

figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.0), layout="constrained")
for axis, (kind, (title, asked)) in zip(axes, kinds.items(), strict=True):
    for row, tone in zip(states, (CLEAN, BACKDOOR), strict=False):
        points = trajectory.trajectory(backdoored, [params for _, params in states[row]], towards)
        steps, angles = [step for step, _ in states[row]], [getattr(point.whole, kind) for point in points]
        axis.plot(steps, angles, "o-", markersize=3, color=tone, label=words.defense(row))
        print(f"{words.defense(row)} ends at {angles[-1]:.0f} degrees to {title}")
    axis.axhline(asked, color="#1c1d1f", linestyle=":", linewidth=1)
    axis.set(xlabel="step", ylabel="degrees", ylim=(60, 190), yticks=range(60, 181, 30))
    axis.set_title(f"Angle to {title} (dotted: asked for)", loc="left", fontsize=10)
axes[0].legend(frameon=False)
plt.show()

# %% [markdown]
# Above 90 degrees the whole way so far has gone against the backdoor's gradient, below 90 with it. An angle on the wrong side
# does not mean that the backdoor is still there: the direction is taken at the first step, where the backdoored model makes
# hardly a mistake on triggered images and its gradient is tiny, and in so many dimensions almost everything is nearly square to
# everything. Hold the angles against the share that is left, above.
#
# Proposition 4.3 asks for adversarial images that the backdoored model takes for the attacker's class while the clean model
# still sees their own. How often does BI-BAU find such images? In the untargeted mode any wrong class counts as fooled.

# %%
scene = checks.scene_of(run, {"none": "implant", "clean": "clean"})
for when, rates in measure.adversarial(scene, "bibau_u", purified["bibau_u"], 24 if QUICK else 250).items():
    shares = {
        "fool the backdoored model": rates["fooled"],
        "are taken for the attacker's class": rates["target"],
        "are right for the clean twin": rates["kept"],
        "fool the one and not the other": rates["both"],
    }
    print(f"Adversarial images at the {when} of BI-BAU (U):")
    for what, share in shares.items():
        print(f"  {100 * share:3.0f} % {what}")

# %% [markdown]
# ## 7. Is the backdoor a task of its own?
#
# An experiment of the paper at its smallest: a network learns clean and poisoned images *together*, or the backdoor first and
# then the clean images with a few poisoned ones, or the other way round. A task of its own would be learned and kept whatever
# the order.

# %%
dataset = data.load("digits")
attack = attacks.get("badnets").make(keys.root(1), num_classes=10)
poisoned = attack.poison(dataset.train.take(slice(0, 200 if QUICK else None)))
parts = task_stream.phases(keys.root(2), poisoned, epochs=20, first_epochs=6, poison_share=0.1, poisoned_images=1)
size = {"width": 8, "stages": (1, 1, 1)}
if QUICK:
    parts = {"backdoor_first": [phase._replace(epochs=1) for phase in parts["backdoor_first"]]}
    size = {"width": 4, "stages": (1,)}

small = models.build("resnet18", **widths.NETWORK | size)
watch = task_stream.watched(small, attack, dataset.test.take(slice(0, 250)))
options = {"padding": 1, "flip": False, "batch_size": 32}
curves = {
    name: task_stream.learn(keys.root(3), small, small.init(keys.root(4)), phases, watch=watch, **options)
    for name, phases in parts.items()
}

# %%
figure, axes = plt.subplots(1, 3, figsize=(8.6, 3.0), sharey=True, layout="constrained")
titles = {"together": "Together", "backdoor_first": "Backdoor, then clean", "clean_first": "Clean, then backdoor"}
for axis, (name, entries) in zip(axes, curves.items(), strict=False):
    for metric, label, tone in (("ca", "clean accuracy", CLEAN), ("asr", "attack success rate", BACKDOOR)):
        axis.plot([entry["epoch"] for entry in entries], [entry[metric] for entry in entries], color=tone, label=label)
    change = sum(entry["task"] == entries[0]["task"] for entry in entries)
    if change < len(entries):
        axis.axvline(change + 0.5, color="#1c1d1f", linestyle=":", linewidth=1)
    axis.set(xlabel="epoch (dotted: the task changes)" if change < len(entries) else "epoch", ylim=(-3, 103))
    axis.set_title(titles[name], loc="left")
axes[0].set_ylabel("% of test images")
axes[0].legend(frameon=False, loc="center right")
plt.show()

# %% [markdown]
# Look at what follows the dotted lines. In the middle: does the attack survive the clean task? On the right: does clean
# accuracy survive the backdoor task? On so few images the order matters; more of this is in `results/theory.md`.
#
# ## At full size
#
# The same from the command line, with records and pictures on disk, on real runs and at the paper's sizes:
#
# - `python -m bibau_jax.theory.three_tasks --out=results/theory`
# - `python -m bibau_jax.theory.widths --out=results/theory`
# - `python -m bibau_jax.theory.task_stream --config=configs/theory/task_stream.py --workdir=runs/task_stream`
# - `python -m bibau_jax.theory.measure runs/digits --out=results/theory/runs`
#
# What they found is in `results/theory.md`; how the paper was read, in `docs/theory.md`.
