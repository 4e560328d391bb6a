"""The package beside PyTorch: arrays that the scripts in tests/torch computed there, in float32, without PyTorch here."""

from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bibau_jax import keys, models, parallel, train
from bibau_jax.attacks import iad, networks, wanet
from bibau_jax.defenses import bibau
from bibau_jax.defenses.adversarial import adversarial_objective, clean_references, e_step
from bibau_jax.information import diagonal_fisher
from bibau_jax.method import ewc
from bibau_jax.method.terms import cross_entropy

HERE = Path(__file__).parent / "torch"


@cache
def stored(file, part):
    """The arrays under `part` of a stored file, as the nested dict that they were."""
    tree = {}
    with np.load(HERE / f"{file}.npz") as arrays:
        for name in arrays.files:
            *path, leaf = name.split("/")
            branch = tree
            for step in path:
                branch = branch.setdefault(step, {})
            branch[leaf] = arrays[name]
    return tree[part]


def network(part):
    return stored("resnet18", part)


def unlearning(part):
    return stored("pgd", part)


@cache
def classifier():
    kernel = network("before")["params"]["conv1"]["kernel"]
    return models.build("resnet18", num_classes=10, image_shape=(32, 32, 3), width=kernel.shape[-1])


@pytest.fixture(autouse=True, scope="module")
def rolled_loops():
    """Scans as GPUs run them, which compile in a fraction of the time that unrolled ones take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "unroll", lambda steps: 1)
        yield


def close(actual, wanted, tolerance):
    """Same structure, and every array within `tolerance` of the wanted one's largest magnitude."""
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    for (path, w), a in zip(jax.tree_util.tree_leaves_with_path(wanted), jax.tree.leaves(actual), strict=True):
        a, w = np.asarray(a, np.float64), np.asarray(w, np.float64)
        assert a.shape == w.shape
        np.testing.assert_allclose(a, w, rtol=0, atol=tolerance * np.abs(w).max(), err_msg=jax.tree_util.keystr(path))


@cache
def training():
    """(gradients, logits, features, statistics and loss) of the stored batch, and the state after two steps of `train.sgd`."""
    images, labels = jnp.asarray(network("images"), jnp.float32), network("labels")
    rate, momentum, weight_decay = map(float, network("settings")["sgd"])
    optimizer = train.sgd(lambda step: rate, momentum=momentum, weight_decay=weight_decay)

    def loss(params, statistics):
        outputs = classifier().apply({"params": params, "batch_stats": statistics}, images, train=True)
        return cross_entropy(outputs.logits, labels).mean(), outputs

    @jax.jit
    def step(params, statistics, opt_state):
        (value, outputs), grads = jax.value_and_grad(loss, has_aux=True)(params, statistics)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        found = {"loss": value, "logits": outputs.logits, "features": outputs.features, "gradients": grads}
        found["batch_stats"] = outputs.statistics
        return jax.tree.map(jnp.add, params, updates), outputs.statistics, opt_state, found

    params, statistics = network("before")["params"], network("before")["batch_stats"]
    params, statistics, opt_state, first = step(params, statistics, optimizer.init(params))
    params, statistics, *_ = step(params, statistics, opt_state)
    return first, {"params": params, "batch_stats": statistics}


def shared():
    values = network("settings")["unlearning"].tolist()
    weights = bibau.Weights(*values[:7], "cosine", values[7], "clip")
    return {"classifier": classifier(), "target": None, "weights": weights}


def perturbation(norm):
    epsilon, step_size, steps = network("settings")[norm].tolist()
    return bibau.Perturbation(norm, epsilon, step_size, int(steps))


def pixels():
    return jnp.asarray(network("images"), jnp.float32)


def test_the_stored_arrays_are_small_and_hold_the_depth_of_resnet18():
    for file in ("resnet18", "pgd"):
        assert (HERE / f"{file}.npz").stat().st_size < 1e6
    assert len(classifier().norms) == 20


def test_evaluation_logits_and_features_are_those_of_pytorch():
    outputs = jax.jit(classifier().apply)(network("before"), network("images"))
    close({"logits": outputs.logits, "features": outputs.features}, network("eval"), 1e-5)


@pytest.mark.parametrize("what,tolerance", [("logits", 1e-5), ("features", 1e-5), ("loss", 1e-6), ("gradients", 5e-5)])
def test_training_mode_gives_the_values_of_pytorch(what, tolerance):
    close(training()[0][what], network("train")[what], tolerance)


def test_running_statistics_move_as_pytorch_moves_them_with_the_unbiased_variance():
    close(training()[0]["batch_stats"], network("train")["batch_stats"], 1e-6)


def test_two_sgd_steps_with_momentum_and_weight_decay_end_where_those_of_pytorch_end():
    close(training()[1], network("after"), 1e-5)
    moved = jax.tree.map(np.subtract, network("after")["params"], network("before")["params"])
    ours = jax.tree.map(np.subtract, jax.device_get(training()[1]["params"]), network("before")["params"])
    close(ours, moved, 1e-3)


@cache
def attacked(norm):
    variables = network("after"), network("before")
    attack = jax.jit(partial(e_step, **shared(), perturbation=perturbation(norm)))
    return attack(pixels(), network("labels"), *variables, keys.root(0))


def test_l2_adversarial_images_are_those_of_pytorch():
    epsilon = perturbation("l2").epsilon
    moved = np.asarray(attacked("l2") - pixels())
    assert np.sqrt((moved**2).sum((1, 2, 3))).max() <= epsilon * (1 + 1e-5)
    close(moved, unlearning("l2")["images"] - network("images"), 1e-4)


def test_linf_adversarial_images_are_those_of_pytorch_but_for_gradients_at_rounding():
    assert np.abs(attacked("linf") - pixels()).max() <= perturbation("linf").epsilon + 1e-4
    apart = np.abs(attacked("linf") - unlearning("linf")["images"]) > 1e-3
    assert apart.mean() < 1e-3


@cache
def parts():
    """The terms of the E-step's objective as one compiled function of x'."""
    options = shared()
    target, labels = options.pop("target"), network("labels")

    def of(adversarial, variables, backdoored):
        clean = clean_references(pixels(), variables, backdoored, **options)
        return adversarial_objective(adversarial, clean, labels, variables, backdoored, target=target, **options)[1]

    return jax.jit(of)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_distillation_prior_and_shares_at_the_stored_images_are_those_of_pytorch(norm):
    wanted = dict(unlearning(norm))
    images = wanted.pop("images")
    found = parts()(images, network("after"), network("before"))
    logits = np.float64(shared()["classifier"].apply(network("before"), images).logits)
    of_labels = logits[np.arange(len(logits)), network("labels")]  # the first term is f_b's cross-entropy, untargeted
    close(found.pop("attack"), np.log(np.exp(logits).sum(1)) - of_labels, 1e-4)
    close(found, wanted, 1e-4)
    assert np.abs(wanted["prior"]).max() > 1e-3


def test_the_diagonal_fisher_is_that_of_pytorch():
    found = diagonal_fisher(classifier(), network("after"), network("images"), network("labels"), chunk=4)
    close(found, unlearning("fisher")["clean"], 5e-5)


def test_ewc_and_its_inverse_are_those_of_pytorch():
    wanted, fisher = unlearning("update"), unlearning("fisher")
    params, anchor = network("after")["params"], network("before")["params"]
    for name, which in (("ewc_quadratic", "clean"), ("iewc_quadratic", "unlearning")):
        close(ewc.quadratic_form(fisher[which], params, anchor), wanted[name], 1e-5)
    cap = shared()["weights"].iewc_cap
    assert wanted["iewc"] < cap
    close(ewc.inverse_penalty(wanted["iewc_quadratic"], cap), wanted["iewc"], 1e-5)


def test_a_whole_outer_update_with_all_terms_is_that_of_pytorch():
    rate, momentum, weight_decay = map(float, network("settings")["sgd"])
    optimizer = train.sgd(lambda step: rate, momentum=momentum, weight_decay=weight_decay)
    first = train.new_state(network("after"), optimizer)
    fishers = unlearning("fisher")["clean"], unlearning("fisher")["unlearning"]
    state = bibau.UnlearningState(first.step, first.params, first.statistics, first.opt_state, *fishers)
    batch = {"images": network("images"), "labels": network("labels")}
    options = {"optimizer": optimizer, "perturbation": perturbation("l2"), "padding": 0, "flip": False}
    step = jax.jit(partial(bibau.step, **shared(), **options))
    state, metrics = step(state, {"backdoored": network("before")}, batch, keys.root(0))
    wanted = dict(unlearning("update"))
    close(state.params, wanted.pop("params"), 1e-4)
    close({name: metrics[name] for name in wanted}, wanted, 1e-4)


# --- triggers


def of_attacks(part):
    return stored("attacks", part)


def test_wanets_field_and_warp_are_those_of_interpolate_and_grid_sample():
    there = of_attacks("warp")
    weights = wanet.cubic_weights(4, 32)
    np.testing.assert_allclose(np.einsum("rh,chw,sw->crs", weights, there["noise"], weights), there["field"], atol=2e-6)
    shift = wanet.clamped(0.5 * there["field"] / 32)
    np.testing.assert_allclose(wanet.warp(there["images"], shift), there["warped"], atol=5e-3)
    np.testing.assert_allclose(wanet.warp(there["images"], shift + there["jitter"] / 32), there["jittered"], atol=5e-3)


@pytest.mark.parametrize("training", [False, True])
def test_iads_generator_gives_pytorchs_images_and_statistics(training):
    there = of_attacks("generator")
    module = networks.Generator(3, there["before"]["params"]["conv1"]["kernel"].shape[-1])
    out, seen = iad.apply(module, there["before"], there["pixels"], training)
    np.testing.assert_allclose(out, iad.squashed(there["train" if training else "eval"]), atol=1e-4)
    close(seen, there["after"] if training else there["before"]["batch_stats"], 1e-4)


def test_issbas_networks_hide_and_read_as_pytorchs_do():
    there = of_attacks("secret")
    width = there["encoder"]["down0"]["kernel"].shape[-1]
    carrying = networks.StegoEncoder(width).apply({"params": there["encoder"]}, there["secrets"], there["images"])
    np.testing.assert_allclose(carrying, there["carrying"], atol=1e-5)
    logits = networks.StegoDecoder(there["secrets"].shape[1], width).apply({"params": there["decoder"]}, carrying)
    np.testing.assert_allclose(logits, there["logits"], atol=1e-5)
