"""Training: one state, one step, one loop. Implanting and the fine-tuning defences all go through `fit`.

A step is a pure function `step(state, frozen, batch, key) -> (state, metrics)`: `frozen` is what it reads and never changes
(the backdoored model, say), and the key is folded from (seed, step), so that a resumed run is the same run.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from bibau_jax import keys, limits, parallel, progress
from bibau_jax.checkpoint import Keeper
from bibau_jax.data.augment import crop_and_flip, cutout
from bibau_jax.errors import Diverged, UserError
from bibau_jax.method.terms import cross_entropy
from bibau_jax.models import Classifier
from bibau_jax.records import Scalars


@struct.dataclass
class TrainState:
    """What training changes. `extra` holds the parameters of an attack that trains its own trigger, () otherwise."""

    step: jax.Array
    params: Any
    statistics: Any
    opt_state: Any
    extra: Any = ()
    extra_opt_state: Any = ()

    @property
    def variables(self) -> dict:
        """Parameters and running statistics, as `Classifier.apply` takes them."""
        return {"params": self.params, "batch_stats": self.statistics}


def new_state(variables, optimizer: optax.GradientTransformation, extra=(), extra_optimizer=None) -> TrainState:
    """The state before the first step, on all devices."""
    # The copy keeps the caller's arrays alive: the state is donated to every step.
    params, statistics, extra = jax.tree.map(jnp.array, (variables["params"], variables["batch_stats"], extra))
    extra_opt_state = extra_optimizer.init(extra) if extra_optimizer else ()
    state = TrainState(jnp.zeros((), jnp.int32), params, statistics, optimizer.init(params), extra, extra_opt_state)
    return parallel.replicate(state)


SCHEDULES = ("cosine", "constant", "multistep", "one_cycle")


def learning_rate_schedule(name: str, peak: float, steps: int) -> optax.Schedule:
    """Learning rate by step, at most `peak`.

    "cosine" falls to 0, "constant" stays, "multistep" falls to a tenth at 50 % and 75 %, "one_cycle" rises for 20 % of the
    steps and falls to 0.
    """
    if name == "cosine":
        return optax.cosine_decay_schedule(peak, steps)
    if name == "constant":
        return optax.constant_schedule(peak)
    if name == "multistep":
        return optax.piecewise_constant_schedule(peak, {steps // 2: 0.1, steps * 3 // 4: 0.1})
    if name == "one_cycle":
        rise = max(1, steps // 5)
        return optax.join_schedules(
            [optax.linear_schedule(peak / 10, peak, rise), optax.linear_schedule(peak, 0.0, max(1, steps - rise))], [rise]
        )
    raise UserError(f'learning rate schedule "{name}" is unknown; choose one of {", ".join(SCHEDULES)}')


def sgd(
    schedule, *, momentum: float, weight_decay: float, max_grad_norm: float = 0.0, nesterov: bool = False
) -> optax.GradientTransformation:
    """SGD as PyTorch's: weight decay joins the gradient before momentum, on all parameters; `max_grad_norm` 0 clips nothing."""
    clip = [optax.clip_by_global_norm(max_grad_norm)] if max_grad_norm else []
    momentum_sgd = optax.sgd(schedule, momentum or None, nesterov=nesterov)
    return optax.chain(*clip, optax.add_decayed_weights(weight_decay), momentum_sgd)


def amsgrad(rate) -> optax.GradientTransformation:
    """Adam with AMSGrad as PyTorch's: the largest second moment so far is taken before its bias is corrected, optax's after."""

    def init(params):
        first, second, most = (jax.tree.map(jnp.zeros_like, params) for _ in range(3))  # three: a state is donated
        return jnp.zeros((), jnp.int32), first, second, most

    def update(grads, state, params=None):
        count, first, second, most = state
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, grads)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, second, grads)
        most = jax.tree.map(jnp.maximum, most, second)
        count += 1
        scale = [1 - decay ** count.astype(jnp.float32) for decay in (0.9, 0.999)]
        steps = jax.tree.map(lambda m, v: (m / scale[0]) / (jnp.sqrt(v / scale[1]) + 1e-8), first, most)
        return steps, (count, first, second, most)

    return optax.chain(optax.GradientTransformation(init, update), optax.scale_by_learning_rate(rate))


def augmented(extra, batch, key, *, padding: int, flip: bool, holes: int = 0):
    """The ordinary preparation of a batch, crop and flip: (pixels in float32, labels, a penalty of 0, `extra` unchanged).

    holes: pixels a side of the square that is cut out of each image, 0 for none.
    """
    pixels = crop_and_flip(keys.stream(key, "augment"), batch["images"], padding=padding, flip=flip)
    pixels = cutout(keys.stream(key, "cutout"), pixels, length=holes)
    return pixels.astype(jnp.float32), batch["labels"], 0.0, extra


def train_step(
    state: TrainState,
    frozen,
    batch,
    key,
    *,
    classifier: Classifier,
    optimizer: optax.GradientTransformation,
    prepare: Callable,
    extra_optimizer: optax.GradientTransformation | None = None,
):
    """One step of cross-entropy training on a batch {"images" uint8, "labels"}; returns (state, {"loss", "accuracy"}).

    `prepare(extra, batch, key) -> (pixels, labels, penalty, extra)` augments the batch; an attack that controls training stamps
    triggers there. The penalty is a number, or a function of the model's outputs. The attack's parameters `extra` are trained
    on the same loss plus the penalty; `prepare` may hand them back with new statistics of their own.
    """

    def objective(params, extra):
        pixels, labels, penalty, seen = prepare(extra, batch, key)
        variables = {"params": params, "batch_stats": state.statistics}
        outputs = classifier.apply(variables, pixels, train=True)
        loss = cross_entropy(outputs.logits, labels).mean() + (penalty(outputs) if callable(penalty) else penalty)
        return loss, (outputs.statistics, seen, jnp.mean(jnp.argmax(outputs.logits, -1) == labels))

    gradient = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
    (loss, (statistics, extra, accuracy)), (grads, extra_grads) = gradient(state.params, state.extra)
    params, opt_state = updated(optimizer, grads, state.opt_state, state.params)
    extra_opt_state = state.extra_opt_state
    if extra_optimizer is not None:
        extra, extra_opt_state = updated(extra_optimizer, extra_grads, extra_opt_state, extra)
    state = TrainState(state.step + 1, params, statistics, opt_state, extra, extra_opt_state)
    return state, {"loss": loss, "accuracy": accuracy}


def updated(optimizer: optax.GradientTransformation, grads, opt_state, params) -> tuple:
    """(parameters, the optimiser's state) after one step along `grads`."""
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


@dataclasses.dataclass(frozen=True)
class Journal:
    """Where a stage of training leaves its traces: checkpoints, scalars, progress; how long it may last, what it may cost.

    The default leaves none, has no end and no limit. Parts of a stage share its clock, or its time, not its guard.
    """

    stage: str = "training"
    keeper: Keeper | None = None
    scalars: Scalars | None = None
    show: bool = False
    clock: limits.Clock = dataclasses.field(default_factory=limits.Clock)
    guard: limits.Guard = dataclasses.field(default_factory=limits.Guard)

    def part(self, name: str, left: int = 1) -> "Journal":
        """The journal of a training within this stage, with checkpoints of its own.

        `left` parts are to come, this one among them, each with an equal share of the time that is left.
        """
        keeper = self.keeper and Keeper(self.keeper.directory / name, self.keeper.every_steps, self.keeper.keep)
        return dataclasses.replace(
            self, stage=f"{self.stage}/{name}", keeper=keeper, guard=limits.Guard(), clock=self.clock.share(left)
        )


def fit(
    step: Callable,
    state,
    data,
    *,
    key: jax.Array,
    epochs: int,
    batch_size: int,
    frozen=(),
    before_epoch: Callable | None = None,
    after_epoch: Callable | None = None,
    stop: Callable | None = None,
    journal: Journal = Journal(),
    whole_epochs: bool | None = None,
):
    """Runs `step` over `epochs` shuffled passes of `data`; returns (state, history), resuming from the journal's checkpoint.

    Args:
      step: `step(state, frozen, batch, key) -> (state, metrics)`, pure; metrics are scalars and hold "loss".
      state: a struct with a field `step`; donated. Loses nothing that the caller holds if it came from `new_state`.
      data: pytree of arrays with one leading axis N, kept whole on every device; a last short batch is dropped.
      before_epoch: `(state, epoch) -> state`, e.g. to refresh a Fisher; runs only where an epoch really begins.
      after_epoch: `(state, epoch) -> dict` of further scalars for the history.
      stop: `(history) -> bool` after an epoch, whether it was the last; the journal's clock may end it too.
      whole_epochs: one compiled call per epoch; by default on GPU and TPU. Checkpoints then fall on the ends of epochs.
      history: one dict per epoch, its seconds, the mean of every metric and what `after_epoch` adds.

    Raises `Diverged` at a loss that is not finite, naming step and last good checkpoint, which it leaves in place.
    """
    data, frozen = parallel.replicate((data, frozen))
    size = len(jax.tree.leaves(data)[0])
    batch_size = min(batch_size, size)
    parallel.check_batch(batch_size, "batch_size")
    run = _Run(step, batch_size, size // batch_size, epochs, key, journal)
    state, history, tally = run.resume(state)
    whole = parallel.whole_epochs() if whole_epochs is None else whole_epochs
    done = int(state.step)
    journal.clock.take(math.fsum(entry["seconds"] for entry in history))
    with progress.bar(epochs * run.steps, journal.stage, start=done, show=journal.show) as bar:
        for epoch in range(done // run.steps, epochs):
            stopped = stop is not None and history and stop(history)
            out_of_time = not stopped and journal.clock.is_over
            if out_of_time:
                journal.clock.cut()
            if stopped or out_of_time or journal.guard.is_over(history):
                if journal.keeper is not None and journal.keeper.latest() != int(state.step):
                    run.save(state, history, tally)
                break
            begun = time.monotonic() - tally.seconds
            first = int(state.step) - epoch * run.steps
            if first == 0 and before_epoch is not None:
                state = before_epoch(state, epoch)
            order = _order(key, epoch, size, run.steps, batch_size)
            if whole and first == 0:
                state, tally = run.epoch(state, frozen, data, order, bar)
            else:
                state, tally = run.by_steps(state, frozen, data, order, first, tally, history, bar, begun)
            entry = tally.means() | (after_epoch(state, epoch) if after_epoch else {})
            seconds = round(time.monotonic() - begun, 3)
            history = [*history, {"epoch": epoch + 1, "step": int(state.step), "seconds": seconds, **entry}]
            journal.clock.take(seconds)
            if journal.scalars is not None:
                journal.scalars.write(stage=journal.stage, **history[-1])
            tally = Tally()
            journal.guard.see(state, history)
            if journal.keeper is not None and (whole or epoch + 1 == epochs or journal.keeper.due(int(state.step))):
                run.save(state, history, tally)
    run.check_finite(state)
    return journal.guard.best(state, history), history


@partial(jax.jit, static_argnums=(2, 3, 4))
def _order(key, epoch, size, steps, batch_size):
    permutation = jax.random.permutation(keys.stream(key, "order", epoch), size)
    return permutation[: steps * batch_size].reshape(steps, batch_size)


class Tally:
    """Sums of metrics over the steps of one epoch, and the seconds that it took before it was cut off."""

    def __init__(self, sums: dict[str, float] | None = None, count: int = 0, seconds: float = 0.0):
        self.sums, self.count, self.seconds = dict(sums or {}), count, seconds

    def add(self, metrics: dict) -> None:
        """Adds arrays [steps] or scalars of every metric."""
        values = {name: np.atleast_1d(np.asarray(value, np.float64)) for name, value in metrics.items()}
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value.sum())
        self.count += len(next(iter(values.values())))

    def means(self) -> dict[str, float]:
        """The mean of every metric."""
        return {name: total / self.count for name, total in self.sums.items()}


class _Run:
    """The compiled step and epoch of one `fit`, and its checkpoints."""

    def __init__(self, step, batch_size, steps, epochs, key, journal):
        self.steps, self.epochs, self.journal = steps, epochs, journal

        def one(state, frozen, data, rows):
            batch = parallel.shard(jax.tree.map(lambda leaf: leaf[rows], data))
            return step(state, frozen, batch, keys.stream(key, "step", state.step))

        def whole(state, frozen, data, order):
            return jax.lax.scan(lambda carry, rows: one(carry, frozen, data, rows), state, order)

        self.one = jax.jit(one, donate_argnums=0)
        self.whole = jax.jit(whole, donate_argnums=0)

    def resume(self, state):
        keeper = self.journal.keeper
        if keeper is None or keeper.latest() is None:
            return state, [], Tally()
        _, state, info = keeper.restore(state)
        return parallel.replicate(state), info["history"], Tally(info["sums"], info["count"], info["seconds"])

    def check_finite(self, state):
        """The loss of a step is that of the parameters before it: those after it are looked at here."""
        if not _is_finite(state):
            self._stop("what was trained is not finite", int(state.step))

    def save(self, state, history, tally):
        self.check_finite(state)
        info = {"history": history, "sums": tally.sums, "count": tally.count, "seconds": tally.seconds}
        self.journal.keeper.save(int(state.step), state, info)

    def epoch(self, state, frozen, data, order, bar):
        before = int(state.step)
        state, metrics = self.whole(state, frozen, data, order)
        tally = Tally()
        self._count(jax.device_get(metrics), before, tally)
        bar.advance(self.steps, loss=tally.means()["loss"])
        return state, tally

    def by_steps(self, state, frozen, data, order, first, tally, history, bar, since):
        waiting, begun, keeper = [], int(state.step) - first, self.journal.keeper
        fetched = time.monotonic()
        for row in range(first, self.steps):
            state, metrics = self.one(state, frozen, data, order[row])
            waiting.append(metrics)
            step, last = begun + row + 1, row + 1 == self.steps
            due = keeper is not None and keeper.due(step) and not last
            # Metrics stay on the device for a while, so that the next step need not wait for the host.
            if due or last or time.monotonic() - fetched > 1.0:
                stacked = {name: np.stack([m[name] for m in jax.device_get(waiting)]) for name in metrics}
                self._count(stacked, step - len(waiting), tally)
                bar.advance(len(waiting), loss=float(stacked["loss"][-1]))
                waiting, fetched = [], time.monotonic()
            if due:
                tally.seconds = time.monotonic() - since
                self.save(state, history, tally)
        return state, tally

    def _count(self, metrics, before, tally):
        loss = np.atleast_1d(metrics["loss"])
        bad = np.flatnonzero(~np.isfinite(loss))
        if len(bad):
            self._stop(f"the loss is {loss[bad[0]]}", before + bad[0] + 1)
        tally.add(metrics)

    def _stop(self, what, step):
        latest = self.journal.keeper and self.journal.keeper.latest()
        kept = f"the checkpoint of step {latest} is kept" if latest else "nothing was saved yet"
        raise Diverged(
            f"{self.journal.stage}: {what} at step {step}; {kept}; "
            "a lower learning rate or smaller penalties, in another --workdir, may help"
        )


@jax.jit
def _is_finite(tree):
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in floats])) if floats else jnp.array(True)


@partial(jax.jit, static_argnums=0)
def _outputs(classifier, variables, pixels):
    outputs = classifier.apply(variables, parallel.shard(pixels))
    return {"logits": outputs.logits, "features": outputs.features}


def predict(classifier: Classifier, variables, images, batch_size: int = 500) -> np.ndarray:
    """The predicted class of every image (uint8 or float 0..255, [N, H, W, C]), int [N], in evaluation mode."""
    return logits(classifier, variables, images, batch_size).argmax(-1)


def logits(classifier: Classifier, variables, images, batch_size: int = 500) -> np.ndarray:
    """The logits of every image (uint8 or float 0..255, [N, H, W, C]), float32 [N, classes], in evaluation mode."""
    return _in_batches(classifier, variables, images, batch_size, "logits")


def features(classifier: Classifier, variables, images, batch_size: int = 500) -> np.ndarray:
    """The features of every image that the linear head is given, float32 [N, D], in evaluation mode."""
    return _in_batches(classifier, variables, images, batch_size, "features")


def _in_batches(classifier, variables, images, batch_size, wanted) -> np.ndarray:
    variables, found = parallel.replicate(variables), []
    for (pixels,), count in parallel.blocks(batch_size, images):
        found.append(parallel.gather(_outputs(classifier, variables, pixels)[wanted])[:count])
    return np.concatenate(found)


def accuracy(classifier: Classifier, variables, images, labels) -> float:
    """The share of images classified right, 0..1."""
    return math.fsum(predict(classifier, variables, images) == labels) / len(labels)
