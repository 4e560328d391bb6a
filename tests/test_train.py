"""Training: schedules, the optimiser's rule, and a loop that can be cut off anywhere and goes on as if it had not been."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

from bibau_jax import keys, limits, parallel, train
from bibau_jax.checkpoint import Keeper
from bibau_jax.errors import UserError
from bibau_jax.records import Scalars, read_lines

# --- schedules and the optimiser


@pytest.mark.parametrize(
    "name, points",
    [
        ("cosine", {0: 1.0, 50: 0.5, 100: 0.0}),
        ("constant", {0: 1.0, 99: 1.0}),
        ("multistep", {0: 1.0, 49: 1.0, 51: 0.1, 74: 0.1, 76: 0.01, 99: 0.01}),
        ("one_cycle", {0: 0.1, 10: 0.55, 20: 1.0, 60: 0.5, 100: 0.0}),
    ],
)
def test_learning_rates_follow_their_schedule(name, points):
    schedule = train.learning_rate_schedule(name, 0.3, 100)
    for step, share in points.items():
        np.testing.assert_allclose(schedule(step), 0.3 * share, atol=1e-6)


@pytest.mark.parametrize("name", train.SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_no_schedule_exceeds_its_peak_or_falls_below_zero_even_in_short_runs(name, steps):
    schedule = train.learning_rate_schedule(name, 0.3, steps)
    rates = [float(schedule(step)) for step in range(steps)]
    assert 0.0 <= min(rates) and max(rates) <= 0.3 + 1e-6 and rates[0] > 0.0


def test_an_unknown_schedule_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match='"linear" is unknown; choose one of cosine, constant, multistep, one_cycle'):
        train.learning_rate_schedule("linear", 0.1, 10)


def test_sgd_is_pytorchs_weight_decay_before_momentum():
    optimizer = train.sgd(lambda step: 0.1 / (1 + step), momentum=0.9, weight_decay=0.01)
    params = {"w": jnp.array([2.0, -1.0])}
    state, by_hand, velocity = optimizer.init(params), np.array([2.0, -1.0]), np.zeros(2)
    for step, gradient in enumerate(([1.0, 0.5], [-0.2, 0.0], [0.3, 2.0])):
        updates, state = optimizer.update({"w": jnp.array(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
        velocity = 0.9 * velocity + np.array(gradient) + 0.01 * by_hand
        by_hand = by_hand - 0.1 / (1 + step) * velocity
        np.testing.assert_allclose(params["w"], by_hand, rtol=1e-6)


def test_nesterov_is_pytorchs():
    optimizer = train.sgd(0.1, momentum=0.9, weight_decay=0.01, nesterov=True)
    params = {"w": jnp.array([1.0, -2.0])}
    state, theirs, buffer = optimizer.init(params), np.array([1.0, -2.0]), np.zeros(2)
    for step in range(4):
        gradient = np.array([0.3, step - 1.0])
        updates, state = optimizer.update({"w": jnp.asarray(gradient, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
        decayed = gradient + 0.01 * theirs
        buffer = 0.9 * buffer + decayed
        theirs = theirs - 0.1 * (decayed + 0.9 * buffer)
        np.testing.assert_allclose(params["w"], theirs, rtol=1e-5)


def test_amsgrad_is_pytorchs_and_takes_the_largest_moment_before_it_is_corrected():
    optimizer, params = train.amsgrad(0.1), {"w": jnp.array([1.0, -2.0])}
    state, theirs = optimizer.init(params), np.array([1.0, -2.0])
    m = v = most = np.zeros(2)
    for step, gradient in enumerate(([1.0, 0.1], [0.01, 3.0], [0.01, 0.0], [-0.5, 0.2]), 1):
        updates, state = optimizer.update({"w": jnp.array(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
        m, v = 0.9 * m + 0.1 * np.array(gradient), 0.999 * v + 0.001 * np.array(gradient) ** 2
        most = np.maximum(most, v)
        theirs = theirs - 0.1 * (m / (1 - 0.9**step)) / (np.sqrt(most / (1 - 0.999**step)) + 1e-8)
        np.testing.assert_allclose(params["w"], theirs, rtol=1e-5)


def test_clipping_bounds_the_gradient_before_weight_decay_and_zero_means_never():
    gradient, params = {"w": jnp.array([30.0, 40.0])}, {"w": jnp.array([1.0, 1.0])}
    for limit, expected in ((5.0, [3.0, 4.0]), (0.0, [30.0, 40.0]), (500.0, [30.0, 40.0])):
        optimizer = train.sgd(lambda step: 1.0, momentum=0.9, weight_decay=0.5, max_grad_norm=limit)
        updates, _ = optimizer.update(gradient, optimizer.init(params), params)
        np.testing.assert_allclose(updates["w"], -(np.array(expected) + 0.5), rtol=1e-6)


# --- the loop, on a small real network

EPOCHS, STEPS = 3, 4  # of a batch of 8, with 3 images left over in every epoch


@pytest.fixture(scope="module")
def images(digits):
    return {"images": digits.train.images[:35], "labels": digits.train.labels[:35]}


@pytest.fixture(scope="module")
def fit(tiny, tiny_variables, images):
    """Trains for three epochs of four steps; every call starts anew."""
    optimizer = train.sgd(train.learning_rate_schedule("cosine", 0.1, EPOCHS * STEPS), momentum=0.9, weight_decay=5e-4)
    prepare = partial(train.augmented, padding=2, flip=False)
    step = partial(train.train_step, classifier=tiny, optimizer=optimizer, prepare=prepare)

    def run(**options):
        state = train.new_state(options.pop("variables", tiny_variables), optimizer)
        options = {"key": keys.root(5), "epochs": EPOCHS, "batch_size": 8, **options}
        return jax.device_get(train.fit(step, state, images, **options))

    return run


@pytest.fixture(scope="module")
def uninterrupted(fit):
    return fit()


def same(found, expected):
    """Bit by bit: parameters, statistics, momentum, step."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def timeless(history):
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in history]


def test_training_lowers_the_loss_and_moves_everything(uninterrupted, tiny_variables):
    state, history = uninterrupted
    assert history[-1]["loss"] < history[0]["loss"]
    jax.tree.map(lambda a, b: np.testing.assert_equal(np.array_equal(a, b), False), state.variables, tiny_variables)


def test_the_history_has_one_entry_an_epoch_with_the_means_of_its_steps(fit, tmp_path):
    scalars = Scalars(tmp_path / "metrics.jsonl")
    state, history = fit(after_epoch=lambda state, epoch: {"extra": epoch}, journal=train.Journal("toy", scalars=scalars))
    assert [(entry["epoch"], entry["step"], entry["extra"]) for entry in history] == [(1, 4, 0), (2, 8, 1), (3, 12, 2)]
    assert all(0 <= entry["accuracy"] <= 1 and entry["loss"] > 0 and entry["seconds"] >= 0 for entry in history)
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [line["loss"] for line in lines] == [entry["loss"] for entry in history]
    assert all(line["stage"] == "toy" for line in lines)


def test_the_callers_arrays_survive_the_donation_of_the_state(fit, tiny_variables):
    mine = jax.tree.map(jnp.array, tiny_variables)
    fit(variables=mine, epochs=1)
    same(jax.device_get(mine), tiny_variables)


def test_the_same_key_gives_the_same_run_and_another_key_another(fit, uninterrupted):
    same(fit()[0], uninterrupted[0])
    assert not np.array_equal(fit(key=keys.root(6))[0].params["head"]["kernel"], uninterrupted[0].params["head"]["kernel"])


def test_a_whole_epoch_in_one_call_is_the_same_training(fit, uninterrupted):
    state, history = fit(whole_epochs=True)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), state, uninterrupted[0])
    for found, expected in zip(history, uninterrupted[1], strict=True):
        np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-5)


class Cut(Exception):
    """Stands for a kill: nothing runs after it."""


class CutKeeper(Keeper):
    """Ends the run when it asks whether a checkpoint is due after `cut_at` steps: that step was taken, its save was not."""

    cut_at = 0

    def due(self, step):
        if step == self.cut_at:
            raise Cut
        return super().due(step)


@pytest.mark.parametrize("cut_at, resumes_from", [(2, None), (4, 3), (5, 3), (7, 6), (8, 6), (11, 9)])
def test_a_run_that_is_cut_off_goes_on_as_if_it_had_not_been(fit, uninterrupted, tmp_path, cut_at, resumes_from):
    cut = CutKeeper(tmp_path, every_steps=3)
    cut.cut_at = cut_at
    with pytest.raises(Cut):
        fit(journal=train.Journal(keeper=cut))
    assert cut.latest() == resumes_from
    state, history = fit(journal=train.Journal(keeper=Keeper(tmp_path, every_steps=3)))
    same(state, uninterrupted[0])
    assert timeless(history) == timeless(uninterrupted[1])


def test_checkpoints_that_fall_on_ends_of_epochs_are_kept_too(fit, uninterrupted, tmp_path):
    cut = CutKeeper(tmp_path, every_steps=STEPS)
    cut.cut_at = 2 * STEPS
    with pytest.raises(Cut):
        fit(journal=train.Journal(keeper=cut))
    assert cut.latest() == STEPS
    state, history = fit(journal=train.Journal(keeper=Keeper(tmp_path, every_steps=STEPS)))
    same(state, uninterrupted[0])
    assert timeless(history) == timeless(uninterrupted[1])


def test_a_run_cut_off_within_an_epoch_can_go_on_by_whole_epochs(fit, uninterrupted, tmp_path):
    cut = CutKeeper(tmp_path, every_steps=3)
    cut.cut_at = 7
    with pytest.raises(Cut):
        fit(journal=train.Journal(keeper=cut))
    state, history = fit(journal=train.Journal(keeper=Keeper(tmp_path, every_steps=3)), whole_epochs=True)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), state, uninterrupted[0])
    assert [entry["step"] for entry in history] == [4, 8, 12]


def test_a_finished_run_is_not_trained_again(fit, uninterrupted, tmp_path):
    journal = train.Journal(keeper=Keeper(tmp_path, every_steps=100))
    fit(journal=journal)
    state, history = fit(journal=journal, before_epoch=lambda state, epoch: pytest.fail("an epoch began"))
    same(state, uninterrupted[0])
    assert len(history) == EPOCHS


def test_what_happens_before_an_epoch_happens_once_even_if_the_run_is_cut_off(fit, tmp_path):
    begun = []

    def note(state, epoch):
        begun.append(epoch)
        return state

    cut = CutKeeper(tmp_path, every_steps=3)
    cut.cut_at = 7
    with pytest.raises(Cut):
        fit(before_epoch=note, journal=train.Journal(keeper=cut))
    fit(before_epoch=note, journal=train.Journal(keeper=Keeper(tmp_path, every_steps=3)))
    assert begun == [0, 1, 2]


# --- the loop, on a step that only counts


@struct.dataclass
class Counter:
    step: jax.Array
    total: jax.Array


def counting(state, frozen, batch, key, bad_step=-1):
    total = state.total + batch.sum()
    loss = jnp.where(state.step + 1 == bad_step, jnp.inf, batch.sum())
    return Counter(state.step + 1, total), {"loss": loss}


def count(size=10, epochs=2, step=counting, **options):
    data = jnp.asarray(2.0 ** np.arange(size), jnp.float32)  # a sum tells which ones were in it
    state = parallel.replicate(Counter(jnp.int32(0), jnp.float32(0)))
    return train.fit(step, state, data, key=keys.root(0), epochs=epochs, **{"batch_size": 2, **options})


def test_every_epoch_sees_every_example_once_in_an_order_of_its_own():
    orders = []

    def noting(state, frozen, batch, key):
        jax.debug.callback(lambda values: orders.append(tuple(values.tolist())), batch, ordered=True)
        return counting(state, frozen, batch, key)

    state, history = count(step=noting)
    jax.effects_barrier()
    assert float(state.total) == 2 * (2**10 - 1)
    assert [entry["loss"] * 5 for entry in history] == [2**10 - 1] * 2
    assert set(orders[:5]) != set(orders[5:])


def test_every_step_has_a_key_of_its_own():
    drawn = []

    def noting(state, frozen, batch, key):
        jax.debug.callback(lambda value: drawn.append(float(value)), jax.random.uniform(key), ordered=True)
        return counting(state, frozen, batch, key)

    count(step=noting)
    jax.effects_barrier()
    assert len(drawn) == len(set(drawn)) == 10


def test_a_training_may_end_when_its_history_says_so_and_is_then_done(tmp_path):
    ends = {"epochs": 4, "stop": lambda history: len(history) == 2, "journal": train.Journal(keeper=Keeper(tmp_path, 100))}
    state, history = count(**ends)
    assert int(state.step) == 10 and len(history) == 2
    again, told = count(**ends)
    assert int(again.step) == 10 and timeless(told) == timeless(history) and float(again.total) == float(state.total)


def test_the_time_of_a_stage_is_shared_by_its_parts_and_counts_that_before_a_kill(tmp_path):
    journal = train.Journal(keeper=Keeper(tmp_path, 100), clock=limits.Clock(1e-9))
    state, history = count(epochs=4, journal=journal.part("first"))
    assert len(history) == 1 and journal.clock.spent == history[0]["seconds"]
    assert count(epochs=4, journal=journal.part("second"))[1] == []  # nothing is left for it
    anew = train.Journal(keeper=Keeper(tmp_path, 100), clock=limits.Clock(1e-9))
    assert len(count(epochs=4, journal=anew.part("first"))[1]) == 1 and anew.clock.is_over
    assert len(count(epochs=4, journal=train.Journal(clock=limits.Clock(3600)))[1]) == 4
    assert journal.clock.has_cut and anew.clock.has_cut


def test_every_part_of_a_stage_has_an_equal_share_of_the_time_that_is_left():
    clock = limits.Clock(60.0)
    first = clock.share(3)
    assert first.limit == 20 and not first.is_over
    first.take(30.0)  # an epoch is not broken off
    assert first.is_over and not clock.is_over and clock.spent == 30
    second = clock.share(2)
    assert second.limit == 15
    second.cut()
    assert clock.has_cut and not first.has_cut
    second.take(31.0)
    assert clock.share(1).is_over and clock.is_over
    assert limits.Clock().share(2).limit == 0  # no end has no share


def test_a_training_that_ends_of_itself_was_not_cut():
    journal = train.Journal(clock=limits.Clock(3600.0))
    count(epochs=1, journal=journal)
    assert not journal.clock.has_cut


@struct.dataclass
class Walker:
    step: jax.Array
    params: jax.Array
    statistics: jax.Array


def walked(state, frozen, batch, key):
    return Walker(state.step + 1, state.params + 1.0, state.statistics - 1.0), {"loss": 0.0 * batch.sum()}


def guarded(folder, accuracies, limit=10.0, epochs=None):
    """(the step whose parameters are given back, epochs run, what the guard says) for these held-out accuracies; before 0.9."""
    guard = limits.Guard(limit, 0.9, Keeper(folder / "best", every_steps=1, keep=1))
    journal = train.Journal(keeper=Keeper(folder / "run", every_steps=1), guard=guard)
    state, history = train.fit(
        walked,
        parallel.replicate(Walker(jnp.int32(0), jnp.float32(0), jnp.float32(0))),
        jnp.zeros(2),
        key=keys.root(0),
        epochs=epochs or len(accuracies),
        batch_size=2,
        after_epoch=lambda state, epoch: {"held_out_accuracy": accuracies[epoch]},
        journal=journal,
    )
    assert float(state.statistics) == -float(state.params)
    return int(state.params), len(history), guard.told


@pytest.mark.parametrize(
    "accuracies, kept, run",
    [
        ([0.2, 0.5, 0.81, 0.85], 4, 4),  # it begins far below and ends within the limit
        ([0.2, 0.85, 0.75, 0.9], 2, 3),  # beyond after within: what comes later is not waited for
        ([0.2, 0.7, 0.75, 0.72], 3, 4),  # never within: the best there is
    ],
)
def test_a_guard_ends_a_training_that_costs_too_much_and_gives_back_the_best(tmp_path, accuracies, kept, run):
    given, epochs, told = guarded(tmp_path, accuracies)
    assert (given, epochs) == (kept, run)
    assert bool(told) == (kept < run or accuracies[-1] < 0.8)
    assert guarded(tmp_path / "free", accuracies, limit=0.0) == (len(accuracies), len(accuracies), "")


def test_a_guard_goes_on_after_a_kill_as_if_there_had_been_none(tmp_path):
    accuracies = [0.2, 0.85, 0.75, 0.9]
    for epochs in (2, 3, 4):
        found = guarded(tmp_path, accuracies, epochs=epochs)
    assert found == guarded(tmp_path / "whole", accuracies)
    assert found[:2] == (2, 3) and "costs 5.0 points (the limit is 10)" in found[2]


def test_a_last_short_batch_is_dropped_and_a_large_batch_is_the_whole_set():
    assert [entry["step"] for entry in count(batch_size=4)[1]] == [2, 4]
    state, history = count(batch_size=64)
    assert [entry["step"] for entry in history] == [1, 2] and float(state.total) == 2 * (2**10 - 1)


@pytest.mark.parametrize("whole", [False, True])
def test_a_loss_that_is_not_finite_stops_in_one_line_and_keeps_the_last_good_checkpoint(tmp_path, whole):
    keeper = Keeper(tmp_path, every_steps=2)
    with pytest.raises(UserError) as caught:
        count(step=partial(counting, bad_step=8), journal=train.Journal("implant", keeper=keeper), whole_epochs=whole)
    good = 5 if whole else 6  # whole epochs save at their ends
    assert str(caught.value).startswith(f"implant: the loss is inf at step 8; the checkpoint of step {good} is kept;")
    assert "\n" not in str(caught.value)
    step, state, _ = keeper.restore(Counter(jnp.int32(0), jnp.float32(0)))
    assert step == good == int(state.step) and np.isfinite(state.total)


@pytest.mark.parametrize("whole", [False, True])
def test_a_state_that_is_not_finite_is_not_saved_though_its_loss_was(tmp_path, whole):
    def bursting(state, frozen, batch, key):
        state, metrics = counting(state, frozen, batch, key)
        return state.replace(total=jnp.where(state.step == 10, jnp.inf, state.total)), metrics | {"loss": 1.0}

    keeper = Keeper(tmp_path, every_steps=2)
    with pytest.raises(UserError, match="implant: what was trained is not finite at step 10; the checkpoint of step"):
        count(step=bursting, journal=train.Journal("implant", keeper=keeper), whole_epochs=whole)
    _, state, _ = keeper.restore(Counter(jnp.int32(0), jnp.float32(0)))
    assert np.isfinite(state.total)
    with pytest.raises(UserError, match="training: what was trained is not finite at step 10; nothing was saved yet"):
        count(step=bursting, whole_epochs=whole)


def test_without_a_checkpoint_the_message_says_so():
    with pytest.raises(UserError, match="training: the loss is inf at step 3; nothing was saved yet"):
        count(step=partial(counting, bad_step=3))


# --- prediction


@pytest.mark.parametrize("size, batch_size", [(13, 5), (13, 13), (3, 500), (10, 5)])
def test_predictions_do_not_depend_on_batches_and_their_padding(tiny, tiny_variables, digits, size, batch_size):
    logits = tiny.apply(tiny_variables, digits.test.images[:size]).logits
    found = train.predict(tiny, tiny_variables, digits.test.images[:size], batch_size=batch_size)
    np.testing.assert_array_equal(found, np.argmax(logits, -1))
    accuracy = train.accuracy(tiny, tiny_variables, digits.test.images[:size], digits.test.labels[:size])
    assert accuracy == np.mean(found == digits.test.labels[:size])
