"""Defences that prune channels: what they find in networks where it was planted, and what they leave alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bibau_jax import defenses, keys, train
from bibau_jax.data import ImageSet
from bibau_jax.defenses import anp, bnp, clp, ep, pruning
from bibau_jax.errors import NotApplicable, UserError
from bibau_jax.models import inside
from bibau_jax.models.classifier import at

PRUNERS = ("anp", "rnp", "clp", "ep", "bnp")


@pytest.fixture
def some(digits) -> ImageSet:
    return digits.train.take(slice(0, 60))


def scales(classifier, variables) -> dict[str, np.ndarray]:
    found = {}
    classifier.map_norms(variables["params"], lambda name, norm: found.setdefault(name, norm))
    return found


# --- pruning itself


@pytest.mark.parametrize("bias", [False, True])
def test_a_pruned_channel_gives_its_bias_or_nothing(bias, tiny, tiny_variables, digits):
    variables = jax.tree.map(np.array, tiny_variables)
    variables["params"]["layer1_0"]["bn1"]["bias"][:] = 2.0
    cut = {name: np.zeros(4, bool) for name in scales(tiny, variables)}
    cut["layer1_0/bn1"][1] = True
    after = pruning.prune(tiny, variables, cut, bias=bias)
    _, found = inside.look(tiny, after, digits.test.images[:5], [("layer1_0", "bn1")])
    given = np.asarray(found["layer1_0/bn1"])
    np.testing.assert_allclose(given[..., 1], 0.0 if bias else 2.0)
    assert np.ptp(given[..., 0]) > 0.1
    assert pruning.count(cut) == {"pruned": 1, "channels": 12}
    assert variables["params"]["layer1_0"]["bn1"]["scale"][1] != 0  # the caller's arrays stay


def test_the_threshold_is_the_largest_that_held_out_accuracy_allows(backdoored):
    classifier, variables = backdoored.classifier, backdoored.variables
    rng = np.random.default_rng(0)
    masks = {name: rng.uniform(size=16) for name in scales(classifier, variables)}
    held_out = backdoored.test.take(slice(0, 200))
    before = train.accuracy(classifier, variables, held_out.images, held_out.labels)

    def accuracy(cut):
        found, told = pruning.by_masks(classifier, variables, masks, held_out, threshold=cut, max_loss=0.0)
        assert told["threshold"] == cut and told["pruned"] == sum(int(np.sum(mask <= cut)) for mask in masks.values())
        return train.accuracy(classifier, found, held_out.images, held_out.labels)

    found, told = pruning.by_masks(classifier, variables, masks, held_out, threshold=0.0, max_loss=0.3)
    chosen = told["threshold"]
    assert chosen == 0 or accuracy(chosen) >= before - 0.3
    assert accuracy(round(chosen + 0.05, 2)) < before - 0.3
    unchanged, told = pruning.by_masks(classifier, variables, masks, held_out, threshold=0.0, max_loss=0.0)
    assert train.accuracy(classifier, unchanged, held_out.images, held_out.labels) >= before


@pytest.mark.parametrize("name", ["anp", "rnp"])
def test_the_threshold_is_chosen_on_held_out_images(name, tiny, tiny_variables, digits, monkeypatch):
    seen, module = [], defenses.get(name)
    real = module.by_masks

    def look(classifier, variables, masks, chosen_on, **options):
        seen.append(chosen_on)
        return real(classifier, variables, masks, chosen_on, **options)

    monkeypatch.setattr(module, "by_masks", look)
    clean, held_out = digits.train.take(slice(0, 16)), digits.test.take(slice(0, 8))
    quick = {"iterations": 2} if name == "anp" else {"unlearn_epochs": 1, "recover_epochs": 1}
    module.purify(keys.root(0), tiny, tiny_variables, clean, held_out=held_out, batch_size=8, **quick)
    assert len(seen) == 1 and seen[0] is held_out


def test_poisoned_images_of_another_size_are_refused(tiny, tiny_variables, some):
    small = dataclasses.replace(some, images=some.images[:, :12])
    with pytest.raises(UserError, match=r"poisoned training images are \[12, 16, 1\], the network takes \[16, 16, 1\]"):
        ep.purify(keys.root(0), tiny, tiny_variables, poisoned=small)


@pytest.mark.parametrize("name", PRUNERS)
def test_a_network_without_norms_is_not_applicable(name, tiny, tiny_variables, some):
    bare = dataclasses.replace(tiny, norms=())
    options = {"poisoned": some} if defenses.is_informed(name) else {}
    with pytest.raises(NotApplicable, match="this network has no normalised convolutions"):
        defenses.get(name).purify(keys.root(0), bare, tiny_variables, some, **options)


# --- CLP


def test_the_bound_of_a_channel_is_its_largest_singular_value_times_its_gain():
    rng = np.random.default_rng(0)
    kernel, scale, variance = rng.normal(size=(3, 3, 5, 7)), rng.normal(size=7), rng.uniform(0.5, 2, 7)
    found = clp.lipschitz(kernel, scale, variance)
    for channel in range(7):
        largest = np.linalg.svd(kernel[..., channel].reshape(9, 5).T, compute_uv=False)[0]
        assert found[channel] == pytest.approx(largest * abs(scale[channel]) / np.sqrt(variance[channel]))
    assert clp.lipschitz(kernel, scale, np.zeros(7)).tolist() == [0] * 7


def test_clp_prunes_a_planted_channel_and_no_other(backdoored):
    variables = jax.tree.map(np.array, backdoored.variables)
    variables["params"]["layer1_0"]["conv2"]["kernel"][..., 5] *= 50
    result = clp.purify(keys.root(0), backdoored.classifier, variables)
    assert result.told["pruned"] == 1
    norm = result.variables["params"]["layer1_0"]["bn2"]
    assert norm["scale"][5] == norm["bias"][5] == 0 and (norm["scale"][[4, 6]] != 0).all()


# --- EP and BNP


def test_the_entropy_of_values_is_that_of_their_histogram():
    values = np.random.default_rng(0).normal(size=(400, 3))
    scaled = (values - values.mean(0)) / values.std(0, ddof=1)
    low, width = scaled.min(), 0.1
    edges = low + width * np.arange(int((scaled.max() - low) / width) + 1)
    for channel, found in enumerate(ep.entropies(values, width)):
        share = np.histogram(scaled[:, channel], edges)[0] / 400
        share[0] -= np.sum(scaled[:, channel] == low) / 400  # a value on an edge is not counted
        expected = -sum(p * np.log(p) for p in share if p > 0)
        assert found == pytest.approx(expected, abs=1e-6)


def test_ep_finds_a_channel_that_answers_in_two_groups():
    rng = np.random.default_rng(1)
    values = rng.normal(size=(500, 32))
    values[:, 9] = np.where(rng.uniform(size=500) < 0.1, 40.0, 0.0) + rng.normal(size=500) * 0.1
    found = ep.entropies(values, 0.1)
    assert found.argmin() == 9 and pruning.outliers(-found, 3.0).nonzero()[0].tolist() == [9]


def test_what_a_norm_is_given_is_what_the_convolution_gives(tiny, tiny_variables, some):
    taps = tiny.apply(tiny_variables, some.images, taps=True).taps
    found = pruning.given(tiny, tiny_variables, some.images, ep.peak)
    np.testing.assert_allclose(found["layer1_0/bn2"], np.asarray(taps["layer1_0/conv2"]).max((1, 2)), rtol=1e-5, atol=1e-5)


def test_the_divergence_of_two_normal_distributions():
    rng = np.random.default_rng(0)
    drawn = rng.normal(0.7, 1.3, 1_000_000)
    log_ratio = (drawn - 0.2) ** 2 / (2 * 0.9) + np.log(0.9) / 2 - (drawn - 0.7) ** 2 / (2 * 1.69) - np.log(1.69) / 2
    assert bnp.divergence(np.float64(0.7), np.float64(1.69), 0.2, 0.9) == pytest.approx(log_ratio.mean(), abs=0.01)
    assert bnp.divergence(np.float64(0.7), np.float64(1.69), 0.7, 1.69) == pytest.approx(0)


def test_bnp_takes_the_variance_over_places_and_images_even_of_a_channel_that_hardly_varies(backdoored, monkeypatch):
    rng, seen = np.random.default_rng(0), []
    values = (rng.normal(size=(6, 4, 4, 3)) * [1.0, 1e-2, 0.0] + [5.0, 20.0, 50.0]).astype(np.float32)
    given = {name: np.asarray(bnp.moments(values)) for name in backdoored.classifier.all_norms}
    monkeypatch.setattr(bnp, "given", lambda *rest: given)
    monkeypatch.setattr(bnp, "divergence", lambda *told: seen.append(told[:2]) or np.zeros(3))
    monkeypatch.setattr(bnp, "prune", lambda classifier, variables, pruned, bias: variables)
    bnp.purify(keys.root(0), backdoored.classifier, backdoored.variables, backdoored.clean)
    assert len(seen) == len(given)
    for mean, variance in seen:
        np.testing.assert_allclose(mean, values.astype(np.float64).mean((0, 1, 2)), rtol=1e-6)
        np.testing.assert_allclose(variance, values.astype(np.float64).var((0, 1, 2)), rtol=1e-2, atol=1e-8)


def test_bnp_prunes_the_channel_whose_statistics_are_not_those_of_clean_images(backdoored):
    variables = jax.tree.map(np.array, backdoored.variables)
    variables["batch_stats"]["layer1_0"]["bn1"]["mean"][3] += 100.0
    result = bnp.purify(keys.root(0), backdoored.classifier, variables, backdoored.clean, padding=0, flip=False)
    assert result.variables["params"]["layer1_0"]["bn1"]["scale"][3] == 0
    assert result.variables["params"]["layer1_0"]["bn1"]["bias"][3] != 0


@pytest.mark.parametrize("zero_bias", [False, True])
def test_ep_takes_biases_too_where_it_is_told_to(zero_bias, tiny, tiny_variables, digits):
    variables = tiny_variables | {"params": jax.tree.map(lambda leaf: leaf + 0.25, tiny_variables["params"])}
    poisoned = digits.train.take(slice(0, 60))
    found = ep.purify(keys.root(0), tiny, variables, poisoned=poisoned, u=1.0, padding=0, flip=False, zero_bias=zero_bias)
    norm = [at(found.variables["params"], path) for path in tiny.all_norms.values()]
    pruned = np.concatenate([part["scale"] == 0 for part in norm])
    assert pruned.any() and found.told["pruned"] == pruned.sum()
    assert (np.concatenate([part["bias"] for part in norm])[pruned] == 0).all() == zero_bias


def test_ep_is_given_poisoned_images_and_says_so(backdoored):
    assert [name for name in defenses.names() if defenses.is_informed(name)] == ["ep"]
    with pytest.raises(UserError, match="ep needs poisoned training images, at least two of them"):
        ep.purify(keys.root(0), backdoored.classifier, backdoored.variables, poisoned=backdoored.clean.take(slice(0)))


# --- ANP and RNP


def test_without_noise_masks_stay_near_one(backdoored):
    options = {"iterations": 12, "batch_size": 50, "padding": 0, "flip": False, "threshold": 0.5}
    given = (keys.root(0), backdoored.classifier, backdoored.variables, backdoored.clean)
    calm, disturbed = (
        np.concatenate(list(anp.purify(*given, learning_rate=0.02, **change, **options).evidence.values()))
        for change in ({"epsilon": 0.0, "alpha": 1.0}, {"epsilon": 0.4})
    )
    assert calm.mean() > 0.97 and calm.min() > 0.85 and calm.max() <= 1
    assert disturbed.min() < calm.min() - 0.1 and disturbed.mean() < calm.mean()


def test_the_worst_noise_is_uphill_and_within_twice_its_bound():
    masks = {"a": jnp.ones(6)}
    slope = {"a": (jnp.arange(6.0) - 2.5, jnp.full(6, -1.0))}

    def loss(noise):
        return sum(jnp.sum(n * s) for n, s in zip(noise["a"], slope["a"], strict=True))

    first = anp.worst_noise(lambda noise: 0.0 * loss(noise), masks, keys.root(0), epsilon=0.4, steps=1)
    found = anp.worst_noise(loss, masks, keys.root(0), epsilon=0.4, steps=1)
    for part, (moved, begun) in enumerate(zip(found["a"], first["a"], strict=True)):
        assert np.abs(begun).max() <= 0.4
        np.testing.assert_allclose(moved - begun, 0.4 * np.sign(slope["a"][part]), atol=1e-6)


def test_masks_and_noise_act_on_scales_and_biases(tiny, tiny_variables):
    masks = anp.ones(tiny, tiny_variables["params"])
    assert {name: mask.tolist() for name, mask in masks.items()} == {
        name: [1.0] * 4 for name in ("bn1", "layer1_0/bn1", "layer1_0/bn2")
    }
    before, masks["bn1"] = scales(tiny, tiny_variables), jnp.array([0.0, 0.5, 1.0, 1.0])
    noise = {name: (jnp.full(4, 0.1), jnp.full(4, -0.2)) for name in masks}
    after = scales(tiny, {"params": anp.masked(tiny, tiny_variables["params"], masks, noise)})
    np.testing.assert_allclose(after["bn1"]["scale"], before["bn1"]["scale"] * np.array([0.1, 0.6, 1.1, 1.1]), rtol=1e-6)
    np.testing.assert_allclose(after["bn1"]["bias"], before["bn1"]["bias"] * 0.8, rtol=1e-6)


def test_rnp_stops_unlearning_when_the_clean_task_is_forgotten(backdoored):
    options = {"batch_size": 50, "padding": 0, "flip": False, "unlearn_epochs": 20, "recover_epochs": 2}
    given = (keys.root(0), backdoored.classifier, backdoored.variables, backdoored.clean)
    found = defenses.get("rnp").purify(*given, unlearned=0.8, unlearn_rate=0.001, **options)
    unlearning = [entry for entry in found.history if entry["loss"] < 0]
    assert unlearning[-1]["accuracy"] <= 0.8 < min(entry["accuracy"] for entry in unlearning[:-1])
    assert len(unlearning) < 20 and found.told["unlearned_to"] == unlearning[-1]["accuracy"]


def test_the_mask_of_a_planted_channel_falls_below_all_others(backdoored):
    variables = jax.tree.map(np.array, backdoored.variables)
    variables["params"]["layer1_0"]["bn2"]["scale"][5] *= 5.0  # a channel that shouts one class over all others
    variables["params"]["head"]["kernel"][5, 0] += 5.0
    options = {"batch_size": 50, "padding": 0, "flip": False, "unlearn_epochs": 1, "unlearn_rate": 1e-6, "max_loss": 0.05}
    given = (keys.root(0), backdoored.classifier, variables, backdoored.clean)
    found = defenses.get("rnp").purify(*given, recover_epochs=20, **options)
    masks = {(name, channel): value for name, mask in found.evidence.items() for channel, value in enumerate(mask)}
    assert min(masks, key=masks.get) == ("layer1_0/bn2", 5)
    assert found.variables["params"]["layer1_0"]["bn2"]["scale"][5] == 0
