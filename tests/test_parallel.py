"""Eight devices give the numbers of one, `pmap` gives them too, and so do two processes."""

import os
import socket
import subprocess
import sys
from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bibau_jax import attacks, checkpoint, experiment, keys, parallel, records, train
from bibau_jax.attacks import iad
from bibau_jax.data import ImageSet
from bibau_jax.data.augment import crop_and_flip
from bibau_jax.defenses import bibau
from bibau_jax.defenses.adversarial import e_step
from bibau_jax.errors import UserError
from bibau_jax.models import Classifier
from bibau_jax.models.layers import Head, Normalize
from tests import regenerate

TERMS = bibau.Weights(1.0, 1.0, 1.0, 0.5, 0.5, 4.0, 0.5, "cosine", 100.0, "neg_log")
L2 = bibau.Perturbation("l2", 200.0, 60.0, 2)


def timeless(history):
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in history]


def close(found, expected, **tolerance):
    chex.assert_trees_all_close(jax.device_get(found), jax.device_get(expected), **tolerance)


@pytest.fixture
def eight():
    with parallel.on_devices(8):
        yield


# --- placement


def test_replicated_leaves_are_whole_on_every_device_and_are_not_placed_twice(eight):
    placed = parallel.replicate({"a": np.arange(6.0), "b": jnp.ones(3)})
    assert placed["a"].is_fully_replicated and len(placed["a"].sharding.device_set) == 8
    assert parallel.replicate(placed)["a"] is placed["a"]


def test_a_sharded_batch_has_an_equal_part_on_every_device(eight):
    spread = jax.jit(parallel.shard)(parallel.replicate(jnp.arange(32.0).reshape(16, 2)))
    assert {shard.data.shape for shard in spread.addressable_shards} == {(2, 2)}
    assert len({shard.device for shard in spread.addressable_shards}) == 8


def test_gathering_brings_whole_arrays_to_the_host_in_their_order(eight):
    spread = jax.jit(parallel.shard)(parallel.replicate({"x": jnp.arange(16)}))
    found = parallel.gather(spread)
    assert isinstance(found["x"], np.ndarray)
    np.testing.assert_array_equal(found["x"], np.arange(16))


def test_sizes_are_padded_to_whole_chunks_on_every_device(eight):
    assert [parallel.padded(size) for size in (1, 8, 9)] == [8, 8, 16]
    assert [parallel.padded(size, chunk=3) for size in (1, 24, 25)] == [24, 24, 48]


def test_a_batch_that_nobody_set_is_one_that_can_be_shared_out(eight):
    assert [parallel.batch_of(size) for size in (350, 121, 8, 5)] == [344, 120, 8, 8]
    with parallel.on_devices(2):
        assert [parallel.batch_of(size) for size in (350, 121, 8, 5)] == [344, 120, 8, 4]


def test_a_batch_that_cannot_be_shared_out_evenly_is_refused(eight, tiny, tiny_variables, digits):
    parallel.check_batch(16, "implant.batch_size")
    with pytest.raises(UserError, match="implant.batch_size=12 cannot be divided among 8 devices; choose a multiple"):
        parallel.check_batch(12, "implant.batch_size")
    with pytest.raises(UserError, match="batch_size=12 cannot be divided"):
        trained(tiny, tiny_variables, digits.train.take(slice(24)), batch_size=12)


@pytest.mark.parametrize("count", [0, 9])
def test_more_devices_than_there_are_cannot_be_asked_for(count):
    with pytest.raises(UserError, match=f"{count} devices were asked for, 8 are there"):
        with parallel.on_devices(count):
            pass


@pytest.mark.parametrize(
    "cores, batch_sizes, given, devices",
    [
        (2, (128, 64), "", 2),
        (6, (128, 48), "", 4),
        (64, (128, 48), "", 8),
        (3, (128, 50), "", 2),
        (4, (25, 7), "", 1),
        (4, (4,), "2", 2),
    ],
)
def test_on_a_cpu_every_core_is_a_device_as_far_as_the_batches_can_be_shared(cores, batch_sizes, given, devices, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    program = (
        f"import os, jax; os.sched_getaffinity = lambda process: range({cores}); from bibau_jax import parallel; "
        f"parallel.use_cores(*{batch_sizes}); print(jax.device_count())"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"} | ({"JAX_NUM_CPU_DEVICES": given} if given else {})
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, env=environment, capture_output=True, check=True, text=True).stdout.split() == [str(devices)]


def test_the_device_count_comes_back_after_its_block_even_after_an_error():
    before = parallel.device_count()
    with pytest.raises(ZeroDivisionError):
        with parallel.on_devices(4):
            assert parallel.device_count() == parallel.mesh().size == 4
            raise ZeroDivisionError
    assert parallel.device_count() == before == 1


def test_a_sum_over_devices_is_the_sum_over_all_examples(eight):
    def fn(params, examples):
        return {"sum": (params * examples).sum(0)}

    examples = jnp.arange(48.0).reshape(16, 3)
    found = parallel.sum_over_devices(fn)(*parallel.replicate((jnp.array([1.0, 2.0, 3.0]), examples)))
    np.testing.assert_allclose(found["sum"], examples.sum(0) * jnp.array([1.0, 2.0, 3.0]))


def test_joining_processes_after_work_has_begun_is_one_clear_error():
    parallel.connect("")  # one process: nothing to join
    jnp.ones(1).block_until_ready()
    with pytest.raises(UserError, match="cannot join the processes at 127.0.0.1:1: "):
        parallel.connect("127.0.0.1:1", processes=2, process=1)


# --- eight devices against one


def trained(classifier, variables, images: ImageSet, batch_size=16):
    optimizer = train.sgd(optax.constant_schedule(0.05), momentum=0.9, weight_decay=5e-4)
    prepare = partial(train.augmented, padding=2, flip=True)
    return train.fit(
        partial(train.train_step, classifier=classifier, optimizer=optimizer, prepare=prepare),
        train.new_state(variables, optimizer),
        {"images": images.images, "labels": images.labels},
        key=keys.root(0),
        epochs=1,
        batch_size=batch_size,
    )


def purified(classifier, variables, images: ImageSet):
    return bibau.purify(
        *(keys.root(0), classifier, variables, images),
        epochs=1,
        batch_size=16,
        learning_rate=0.05,
        pgd=L2._replace(start="random"),
        iewc_form="neg_log",  # awake from the second step on
        lambda_iewc=0.5,
        max_grad_norm=2.0,
        padding=2,
        fisher_chunk=4,
    )


def test_training_on_eight_devices_is_training_on_one(tiny, tiny_variables, digits):
    images = digits.train.take(slice(40))
    expected, history = trained(tiny, tiny_variables, images)
    with parallel.on_devices(8):
        found, same_history = trained(tiny, tiny_variables, images)
        assert len(found.params["conv1"]["kernel"].sharding.device_set) == 8
    close(found.variables, expected.variables, atol=1e-5)
    close(timeless(same_history), timeless(history), rtol=1e-4)


def test_bibau_on_eight_devices_is_bibau_on_one(tiny, tiny_variables, digits):
    """E-step, both Fisher diagonals, M-step, BatchNorm over the global batch, and the samples at the end."""
    images = digits.train.take(slice(40))
    expected = purified(tiny, tiny_variables, images)
    with parallel.on_devices(8):
        found = purified(tiny, tiny_variables, images)
    close(found.variables, expected.variables, atol=2e-4)
    close(timeless(found.history), timeless(expected.history), rtol=1e-3)
    assert expected.history[0]["iewc_awake"] > 0
    apart = np.abs(found.samples["adversarial"].astype(int) - expected.samples["adversarial"])
    assert apart.mean() < 0.05


@pytest.mark.parametrize(
    "name, own",
    [("enhanced_adap_patch", None)]
    + [pytest.param(name, own, marks=pytest.mark.slow) for name, own in (("wanet", None), ("iad", (16, 16, 1)))],
)
def test_an_attack_that_takes_a_hand_in_training_takes_it_on_eight_devices_too(tiny, tiny_variables, digits, name, own):
    """What is stamped lies in the first places of the batch, that is on some devices only."""
    images = digits.train.take(slice(64))
    attack = attacks.get(name).make(keys.root(0), num_classes=10, poison_ratio=0.1, **({"width": 2} if own else {}))
    control, optimizer = attack.control, train.sgd(optax.constant_schedule(0.05), momentum=0.9, weight_decay=5e-4)
    extra = iad.fresh(keys.root(1), own, width=2) if own else ()
    data = {"images": images.images, "labels": images.labels}
    if not control.stamps:
        found = attack.poison(images)
        data = {flag: getattr(found, flag) for flag in ("images", "labels", "poisoned", "cover")}
    states = []
    for devices in (1, 8):
        with parallel.on_devices(devices):
            state, _ = train.fit(
                partial(
                    train.train_step,
                    classifier=tiny,
                    optimizer=optimizer,
                    prepare=partial(control.prepare, augment=partial(crop_and_flip, padding=2, flip=True)),
                    extra_optimizer=control.optimizer,
                ),
                train.new_state(tiny_variables, optimizer, extra, control.optimizer),
                data,
                key=keys.root(0),
                epochs=1,
                batch_size=32,
            )
            states.append(jax.device_get((state.variables, state.extra)))
    close(states[1][0], states[0][0], atol=1e-4)
    # Adam takes whole steps of 0.01 whatever the gradient's size, so rounding tells where that is next to nothing.
    apart = [np.abs(a - b) for a, b in zip(*map(jax.tree.leaves, (states[1][1], states[0][1])), strict=True)]
    assert not own or np.mean(np.concatenate([leaf.ravel() for leaf in apart]) > 1e-4) < 0.05


@pytest.mark.parametrize("name", ["iad", "issba"])
def test_networks_stamp_on_eight_devices_what_they_stamp_on_one(name, digits):
    images = digits.test.take(slice(13))
    stamped = []
    for devices in (1, 8):
        with parallel.on_devices(devices):
            stamped.append(regenerate.attack(name, shape=(16, 16, 1)).stamp(images.images, images.ids).astype(int))
    np.testing.assert_allclose(stamped[1], stamped[0], atol=1)


@pytest.mark.parametrize("size", [1, 13])
def test_predictions_on_eight_devices_are_those_of_one(tiny, tiny_variables, digits, size):
    expected = train.predict(tiny, tiny_variables, digits.test.images[:size], batch_size=5)
    with parallel.on_devices(8):
        found = train.predict(tiny, tiny_variables, digits.test.images[:size], batch_size=5)
    np.testing.assert_array_equal(found, expected)
    assert found.shape == (size,)


# --- the same outer update by pmap


class WithoutNorm(nn.Module):
    """A convolution and a head: without BatchNorm the mean of the devices' gradients is the batch's gradient."""

    @nn.compact
    def __call__(self, pixels, train=False):
        x = nn.relu(nn.Conv(3, (3, 3))(Normalize((0.3,), (0.4,))(pixels)))
        features = x.mean((1, 2))
        return Head(10, name="head")(features), features


def test_the_outer_update_mapped_by_pmap_gives_the_same_parameters(eight, digits):
    classifier = Classifier(WithoutNorm(), 10, (16, 16, 1))
    backdoored = {"params": classifier.init(keys.root(0))["params"], "batch_stats": {}}
    optimizer = train.sgd(optax.constant_schedule(0.5), momentum=0.9, weight_decay=5e-4)
    fresh = bibau._first_state(backdoored, optimizer)
    moved = jax.tree.map(lambda leaf: leaf + 0.05, fresh.params)  # so that all four terms have a say
    ones = jax.tree.map(jnp.ones_like, moved)
    state = fresh.replace(params=moved, fisher_clean=ones, fisher_unlearning=ones)
    images, labels = digits.train.images[:32].astype(np.float32), digits.train.labels[:32]
    shared = {"classifier": classifier, "target": None, "weights": TERMS}

    @partial(jax.pmap, axis_name="devices", in_axes=(None, None, 0, 0), out_axes=None)
    def by_pmap(state, backdoored, images, labels):
        adversarial = e_step(images, labels, state.variables, backdoored, keys.root(0), perturbation=L2, **shared)
        gradient = jax.grad(bibau.m_step_loss, has_aux=True)
        grads, _ = gradient(state.params, state, images, adversarial, labels, backdoored, **shared)
        grads = jax.lax.pmean(grads, "devices")
        updates, _ = optimizer.update(grads, state.opt_state, state.params)
        return optax.apply_updates(state.params, updates)

    @jax.jit
    def by_jit(state, backdoored, images, labels):
        batch = parallel.shard({"images": images, "labels": labels})
        options = {"optimizer": optimizer, "perturbation": L2, "padding": 0, "flip": False}
        return bibau.step(state, {"backdoored": backdoored}, batch, keys.root(0), **options, **shared)

    found, metrics = by_jit(*parallel.replicate((state, backdoored, images, labels)))
    with jax.default_device(None):
        expected = by_pmap(*jax.device_get((state, backdoored)), images.reshape(8, 4, 16, 16, 1), labels.reshape(8, 4))
    assert metrics["iewc_awake"] == 1.0 and metrics["kd"] != 0.0 and metrics["prior"] != 0.0
    close(found.params, expected, atol=1e-6)
    change = jax.tree.map(lambda a, b: np.abs(a - b).max(), jax.device_get(found.params), jax.device_get(moved))
    assert min(jax.tree.leaves(change)) > 1e-3


@pytest.mark.slow
def test_two_processes_on_one_machine_leave_the_models_of_one(program, tiny_config, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")  # for each of them
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    settings = {"defense.beside": "ft", "implant.clean_twin": "train", "reactivate.checks": "retuning,query,bec,path,features"}

    def both(*flags):
        shared = (f"--workdir={tmp_path / 'two'}", f"--config.distributed.coordinator=127.0.0.1:{port}", *flags)
        shared += ("--config.distributed.processes=2", *(f"--config.{name}={value}" for name, value in settings.items()))
        pair = [program(*shared, f"--config.distributed.process={process}") for process in range(2)]
        said = [process.communicate(timeout=300) for process in pair]
        assert [process.returncode for process in pair] == [0, 0], said
        return [stdout + stderr for stdout, stderr in said]

    lead, follower = both()
    assert "report: " in lead and "report: " not in follower  # only one of them speaks
    record = experiment.run(tiny_config(settings), tmp_path / "one")
    there = records.read(tmp_path / "two" / "record.json")
    assert there.device["processes"] == 2 and there.device["count"] == 2
    assert {name: row.ca for name, row in there.metrics.items()} == {name: row.ca for name, row in record.metrics.items()}
    for name, row in record.metrics.items():
        assert there.metrics[name].extra.keys() == row.extra.keys()
        assert there.metrics[name].extra["bec"] == pytest.approx(row.extra["bec"], rel=0.02, abs=0.02)
    for stage in ("implant", "purify/bibau_u", "purify/ft"):  # the search for adversarial images magnifies rounding
        found, expected = (checkpoint.load(tmp_path / run / stage / "model")[0] for run in ("two", "one"))
        close(found, expected, atol=1e-3)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "two").rglob("*") if path.name != "report.html"}
    both()  # finished work is found by both
    assert before == {path: path.stat().st_mtime_ns for path in before}
