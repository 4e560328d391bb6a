"""The linearised network: its tangent, its training in closed form, and its distance from the network itself."""

import jax
import numpy as np
import pytest
from scipy import special

from bibau_jax import keys, models, parallel, train
from bibau_jax.errors import UserError
from bibau_jax.theory import flow, linearize, ntk, path, products
from tests.conftest import DIGITS


@pytest.fixture(scope="module")
def sample(digits):
    images, labels = digits.train.images[:16], digits.train.labels[:16]
    return images, flow.centred_one_hot(labels, 10), labels


def apart(found, expected) -> float:
    return np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max()


# --- the tangent


def test_it_is_the_network_at_its_start_and_touches_it_there(tiny, tiny_variables, sample):
    images, start = sample[0], tiny_variables["params"]
    here = train.logits(tiny, tiny_variables, images)
    assert apart(linearize.outputs(tiny, tiny_variables, start, images), here) < 1e-6
    off = []
    for size in (1e-2, 5e-3):
        moved = jax.tree.map(lambda leaf: leaf * (1 + size), start)  # noqa: B023
        there = train.logits(tiny, tiny_variables | {"params": moved}, images)
        off.append(np.abs(linearize.outputs(tiny, tiny_variables, moved, images) - there).max())
        assert off[-1] < 0.2 * np.abs(there - here).max()
    assert off[1] < 0.3 * off[0]  # the error is of second order: half the way, a quarter of it


def test_a_linear_model_is_its_own_linearisation(linear, sample):
    classifier, variables = linear
    other = jax.tree.map(lambda leaf: leaf + 0.1, variables["params"])
    expected = train.logits(classifier, {"params": other}, sample[0])
    assert apart(linearize.outputs(classifier, variables, other, sample[0]), expected) < 1e-5


def test_eight_devices_linearise_and_descend_as_one(tiny, tiny_variables, sample):
    images, targets, _ = sample
    options = {"loss": "squared", "step_size": 1e-3, "steps": 3}
    expected = linearize.descend(tiny, tiny_variables, images[:13], targets[:13], **options)
    with parallel.on_devices(8):
        found = linearize.descend(tiny, tiny_variables, images[:13], targets[:13], **options)
        there = linearize.outputs(tiny, tiny_variables, expected["params"], images)
    assert apart(there, linearize.outputs(tiny, tiny_variables, expected["params"], images)) < 1e-5
    for a, b, c in zip(*map(jax.tree.leaves, (found, expected, tiny_variables)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
        assert a.shape == c.shape


# --- its training


def test_closed_form_is_gradient_descent_on_a_linear_model(linear, sample, digits):
    (classifier, variables), (images, targets, _) = linear, sample
    unseen = digits.test.images[:7]
    everything = np.concatenate([images, unseen])
    block, start = ntk.kernel(classifier, variables, everything, images), train.logits(classifier, variables, everything)
    of = flow.spectrum(block[:160])
    step_size = 0.5 / of.values[-1]
    for steps in (1, 40):
        found = flow.squared(of, start[:16], targets, time=steps * step_size, step_size=step_size)
        trained = linearize.descend(classifier, variables, images, targets, loss="squared", step_size=step_size, steps=steps)
        real = train.logits(classifier, trained, everything)
        assert apart(flow.moved(block, start, found), real) < 1e-5
        there = linearize.parameters(classifier, variables, images, found)
        assert apart(there["head"]["kernel"], trained["params"]["head"]["kernel"]) < 1e-5
    assert np.abs(real - start).max() > 0.1


def test_cross_entropy_is_gradient_descent_on_a_linear_model(linear, sample):
    (classifier, variables), (images, _, labels) = linear, sample
    kernel, start = ntk.kernel(classifier, variables, images), train.logits(classifier, variables, images)
    step_size = 0.5 / flow.spectrum(kernel).values[-1]
    found = flow.cross_entropy(kernel, start, labels, time=40 * step_size, step_size=step_size)
    trained = linearize.descend(classifier, variables, images, labels, loss="cross_entropy", step_size=step_size, steps=40)
    assert apart(flow.moved(kernel, start, found), train.logits(classifier, trained, images)) < 1e-5


@pytest.fixture(scope="module")
def gram():
    rng = np.random.default_rng(0)
    rows, start, targets = rng.normal(size=(12, 30)), rng.normal(size=(4, 3)), rng.normal(size=(4, 3))
    return rows @ rows.T, start, targets


def test_flow_is_the_limit_of_small_steps(gram):
    kernel, start, targets = gram
    of, time = flow.spectrum(kernel), 0.05
    small = flow.squared(of, start, targets, time=time, step_size=time / 20_000)
    assert apart(flow.squared(of, start, targets, time=time), small) < 1e-3
    labels = targets.argmax(1)
    small = flow.cross_entropy(kernel, start, labels, time=time, step_size=time / 20_000)
    assert apart(flow.cross_entropy(kernel, start, labels, time=time), small) < 1e-3


def test_the_flow_follows_its_differential_equation(gram):
    kernel, start, targets = gram
    of, time, moment, ridge = flow.spectrum(kernel), 0.02, 1e-6, 0.3
    before, here, after = (flow.squared(of, start, targets, time=time + d, ridge=ridge) for d in (-moment, 0, moment))
    expected = targets - flow.moved(kernel, start, here) - ridge * here
    assert apart((after - before) / (2 * moment), expected) < 1e-6


def test_nothing_moves_in_no_time_and_all_is_fitted_in_the_end(gram):
    kernel, start, targets = gram
    of, labels = flow.spectrum(kernel), targets.argmax(1)
    assert not flow.squared(of, start, targets, time=0.0).any()
    assert not flow.cross_entropy(kernel, start, labels, time=0.0).any()
    assert apart(flow.moved(kernel, start, flow.squared(of, start, targets)), targets) < 1e-9
    fitted = flow.moved(kernel, start, flow.cross_entropy(kernel, start, labels, time=5.0))
    assert special.softmax(fitted, 1)[np.arange(4), labels].min() > 0.95


def test_the_end_with_a_ridge_is_kernel_regression(gram):
    kernel, start, targets = gram
    expected = np.linalg.solve(kernel + 2.0 * np.eye(12), (targets - start).ravel())
    assert apart(flow.squared(flow.spectrum(kernel), start, targets, ridge=2.0).ravel(), expected) < 1e-9


def test_directions_that_the_kernel_does_not_know_are_left_alone():
    kernel = np.diag([1.0, 0.0])
    found = flow.squared(flow.spectrum(kernel), np.zeros((2, 1)), np.ones((2, 1)))
    np.testing.assert_allclose(found, [[1.0], [0.0]])


def test_rounding_of_a_float32_kernel_is_not_inverted():
    """Twelve inputs of which four are there twice: all that their copies add to the spectrum is rounding."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(8, 30))[[*range(8), *range(4)]]
    exact, start, targets = rows @ rows.T, np.zeros((12, 1)), rng.normal(size=(12, 1))
    rounding = 1e-7 * exact.max() * rng.normal(size=(12, 12))
    of = flow.spectrum(exact + rounding + rounding.T)
    assert apart(flow.squared(of, start, targets), np.linalg.pinv(exact, rcond=1e-9) @ targets) < 1e-5
    assert np.abs(flow.squared(of, start, targets, cut=1e-12)).max() > 1e4


def test_spectra_are_float64_whatever_the_kernel_is(gram):
    of = flow.spectrum(gram[0].astype(np.float32))
    assert of.values.dtype == of.vectors.dtype == np.float64
    assert (of.values >= 0).all() and (flow.spectrum(-np.eye(3)).values == 0).all()


def test_kernels_without_a_spectrum_are_told(gram):
    for wrong, words in (
        (gram[0][:3], "symmetric kernel of a set with itself"),
        (np.triu(gram[0]), "symmetric kernel"),
        (np.zeros((0, 0)), "symmetric kernel"),
        (gram[0] * np.nan, "not finite"),
    ):
        with pytest.raises(UserError, match=words):
            flow.spectrum(wrong)
        with pytest.raises(UserError, match=words):
            flow.cross_entropy(wrong, gram[1], np.zeros(4, int), time=1.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"time": -1.0}, "time=-1.0 must not be negative"),
        ({"time": np.nan}, "time=nan must not be"),
        ({"time": 10.0, "step_size": 1.0}, "step_size must stay below 0.0"),
        ({"time": 0.1, "step_size": -0.01}, "step_size=-0.01 must be finite and not negative"),
        ({"time": 0.001, "step_size": 0.002}, "time=0.001 is no whole number of steps of step_size=0.002"),
        ({"time": 0.0025, "step_size": 0.001}, "time=0.0025 is no whole number of steps"),
    ],
)
def test_both_losses_refuse_the_same_times_and_steps(gram, options, words):
    kernel, start, targets = gram
    with pytest.raises(UserError, match=words):
        flow.squared(flow.spectrum(kernel), start, targets, **options)
    with pytest.raises(UserError, match=words):
        flow.cross_entropy(kernel, start, targets.argmax(1), **options)


def test_mistakes_in_a_training_are_told(gram):
    kernel, start, targets = gram
    with pytest.raises(UserError, match="ridge=-2.0 must not be"):
        flow.squared(flow.spectrum(kernel), start, targets, ridge=-2.0)
    with pytest.raises(UserError, match="must be of one shape, with as many numbers as the kernel has rows"):
        flow.squared(flow.spectrum(kernel), start[:-1], targets[:-1])
    with pytest.raises(UserError, match="must be of one shape"):
        flow.cross_entropy(kernel, start, np.zeros(3, int), time=1.0)
    with pytest.raises(UserError, match="give a finite time"):
        flow.cross_entropy(kernel, start, np.zeros(4, int), time=np.inf)
    for label in (-1, 3, 0.5):
        with pytest.raises(UserError, match="labels must be one whole number from 0 to 2"):
            flow.cross_entropy(kernel, start, np.array([0, 1, 2, label]), time=1.0)
        with pytest.raises(UserError, match="labels must be one whole number from 0 to 2"):
            flow.centred_one_hot(np.array([label]), 3)


def test_the_network_itself_is_not_trained_on_targets_that_do_not_fit(tiny, tiny_variables, sample):
    images, targets, labels = sample
    for loss, given, wanted, words in (
        ("hinge", images, targets, 'loss "hinge" is unknown'),
        ("squared", images, targets[:5], r"or n labels for the cross-entropy, not \[5, 10\] for 16"),
        ("squared", images, labels, r"takes targets \[n, 10\], .* not \[16\] for 16"),
        ("squared", images[:0], targets[:0], r"not \[0, 10\] for 0"),
        ("cross_entropy", images, labels[:5], r"not \[5\] for 16"),
        ("cross_entropy", images, labels - 10, "labels must be one whole number from 0 to 9"),
        ("cross_entropy", images, targets, "labels must be"),
    ):
        with pytest.raises(UserError, match=words):
            linearize.descend(tiny, tiny_variables, given, wanted, loss=loss, step_size=0.1, steps=1)
    for options in ({"step_size": 0.1, "steps": -1}, {"step_size": 0.0, "steps": 1}, {"step_size": np.inf, "steps": 1}):
        with pytest.raises(UserError, match=f"steps={options['steps']} not negative"):
            linearize.descend(tiny, tiny_variables, images, targets, loss="squared", **options)


def test_wider_networks_are_closer_to_their_linearisation(digits):
    images, labels = digits.train.images[:12], digits.train.labels[:12]
    found = []
    for width in (4, 32):
        classifier = models.build("resnet18", stages=(1,), **(DIGITS | {"width": width}))
        variables = path.recalibrated(classifier, jax.device_get(classifier.init(keys.root(0))), digits.train.images[:32])
        targets = flow.centred_one_hot(labels, 10)
        found.append(linearize.gap(classifier, variables, images, targets, digits.test.images[:6], steps=30))
    narrow, wide = found
    assert wide.training < 0.8 * narrow.training and wide.others < 0.8 * narrow.others and wide.moved < 0.7 * narrow.moved
    assert narrow.loss < 0.9 and wide.loss < 0.9


def test_products_find_the_same_coefficients_without_the_kernel(linear, sample):
    """Kernel regression with a ridge, once by the spectrum and once by conjugate gradients."""
    (classifier, variables), (images, targets, _) = linear, sample
    kernel, start = ntk.kernel(classifier, variables, images), train.logits(classifier, variables, images)
    ridge = 0.1 * flow.spectrum(kernel).values[-1]
    expected = flow.squared(flow.spectrum(kernel), start, targets, ridge=ridge)
    found = products.solve(classifier, variables, images, targets - start, ridge=ridge)
    assert apart(found.vector, expected) < 1e-3
