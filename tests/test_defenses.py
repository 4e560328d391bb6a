"""What holds for every defence there is, on the digits and a small network with a backdoor."""

import inspect
import json
from functools import cache

import jax
import numpy as np
import pytest

from bibau_jax import defenses, keys, train
from bibau_jax.data import ImageSet
from bibau_jax.defenses import anp, bibau, bti_dbf, ibu, inversion, nad, rnp
from bibau_jax.errors import UserError
from bibau_jax.method.settings import Perturbation
from configs import base
from tests import regenerate

# Whole runs of these take a while; a few steps of each are in the golden runs and in tests of their own.
LONG = ("anp", "rnp", "i_bau", "sau", "nad", "nc", "bti_dbf", "pam")
PRUNE = ("anp", "rnp", "clp", "ep", "bnp")


def of(names, *, long=LONG):
    return pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in long else ()) for n in names])


def taking(option: str) -> list[str]:
    return [name for name in defenses.names() if option in inspect.signature(defenses.get(name).purify).parameters]


EVERY = of(defenses.names())
# Quick rather than good: few, large steps.
QUICK = {
    "epochs": 8,
    "batch_size": 50,
    "learning_rate": 0.05,
    "schedule": "cosine",
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "max_grad_norm": 2.0,
    "padding": 1,
    "flip": False,
    "pgd": Perturbation("l2", 400.0, 200.0, 2),
    "fisher_chunk": 50,
    "target_label": 0,
}
# For those that need something else; digits have large margins, and the small network few channels.
QUICK_OF = {
    "anp": {"iterations": 120, "learning_rate": 0.1, "epsilon": 0.2},
    "rnp": {"unlearn_rate": 0.001, "recover_epochs": 40, "max_loss": 0.08},
    "clp": {"u": 3.0},
    "ep": {"u": 1.5},
    "bnp": {"u": 3.0},
    "i_bau": {"epochs": 5, "learning_rate": 1e-3, "radius": 5.0},
    "sau": {"epochs": 8, "learning_rate": 5e-4, "epsilon": 102.0, "step_size": 102.0},
    "nad": {"epochs": 8, "teacher_epochs": 8, "teacher_rate": 1.0, "learning_rate": 0.1, "betas": (1000.0,)},
    "nc": {"inversion_epochs": 60, "enough": 0.9, "patience": 2, "padding": 0, "limit": 1.5},
    "bti_dbf": {"rounds": 2, "pretrain_epochs": 10, "mask_epochs": 10, "generator_epochs": 15, "width": 8},
    "pam": {"rounds": 2, "pretrain_epochs": 10, "mask_epochs": 10, "generator_epochs": 15, "width": 8},
}
QUICK_OF["bti_dbf"] |= {"learning_rate": 5e-3, "share": 0.5, "epochs": 10}
QUICK_OF["pam"] |= {"learning_rate": 0.1, "momentum": 0.5, "share": 0.5, "rho": 0.1}
# Reversed images of digits are taken for another class than the attacker's: unlearning them weakens the backdoor and no more.
LEFT = {name: 0.35 for name in LONG} | {"bti_dbf": 0.6, "pam": 0.6}


def purify(name, backdoored, clean=None, seed=0, **options):
    fn = defenses.get(name).purify
    known = inspect.signature(fn).parameters
    options = {option: value for option, value in (QUICK | QUICK_OF.get(name, {}) | options).items() if option in known}
    clean = backdoored.clean if clean is None else clean
    if defenses.is_ideal(name):
        fits = clean.images.shape[1:] == backdoored.classifier.image_shape
        images = backdoored.attack.stamp(clean.images, clean.ids) if fits else clean.images
        options["triggered"] = ImageSet(images, clean.labels, clean.ids)
    if defenses.is_informed(name):
        made = backdoored.attack.poison(backdoored.test)
        options["poisoned"] = ImageSet(made.images, made.labels, backdoored.test.ids)
    return fn(keys.root(seed), backdoored.classifier, backdoored.variables, clean, **options)


@pytest.fixture(scope="module")
def purified(backdoored):
    """What a defence makes of the small network; each is run once."""
    return cache(lambda name: purify(name, backdoored, held_out=backdoored.test.take(slice(60))))


def equal(a, b) -> bool:
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def test_the_small_network_has_a_backdoor(backdoored):
    clean_accuracy, attack_success_rate = backdoored.rates(backdoored.variables)
    assert clean_accuracy > 0.93 and attack_success_rate > 0.95


@EVERY
def test_it_keeps_most_of_the_clean_accuracy(name, purified, backdoored):
    assert backdoored.rates(purified(name).variables)[0] > 0.6


@of(["base_at", "bibau_t", "bibau_u", "ibu", "ep", "anp", "rnp", "i_bau", "sau", "nc", "nad", "bti_dbf", "pam"])
def test_it_takes_the_backdoor_away_where_doing_nothing_leaves_it(name, purified, backdoored):
    assert backdoored.rates(purified(name).variables)[1] < LEFT.get(name, 0.1)
    assert backdoored.rates(backdoored.variables)[1] > 0.9


@EVERY
def test_everything_it_gives_back_is_finite_and_of_the_networks_shapes(name, purified, backdoored):
    result = purified(name)
    assert jax.tree.structure(result.variables) == jax.tree.structure(backdoored.variables)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.variables))
    assert all(np.isfinite(value) for entry in result.history for value in entry.values())


@of(["ft", "base_at", "bibau_t", "bibau_u", "ibu"])
def test_its_history_has_every_epoch_and_the_accuracy_on_held_out_images(name, purified, backdoored):
    result = purified(name)
    assert [(entry["epoch"], entry["step"]) for entry in result.history] == [(n, 4 * n) for n in range(1, 9)]
    held_out = backdoored.test.take(slice(60))
    expected = train.accuracy(backdoored.classifier, result.variables, held_out.images, held_out.labels)
    assert result.history[-1]["held_out_accuracy"] == expected


@EVERY
def test_the_same_key_gives_the_same_model_and_the_suspicious_one_stays_as_it_is(name, purified, backdoored):
    first, before = purified(name), jax.tree.map(np.array, backdoored.variables)
    placed = jax.device_put(before)  # arrays on the device could be donated, those of the host could not
    again = purify(name, backdoored._replace(variables=placed), held_out=backdoored.test.take(slice(60)))
    assert equal(jax.device_get(placed), before)
    assert equal(again.variables, first.variables)
    for one, other in zip(again.history, first.history, strict=True):
        assert one | {"seconds": 0} == other | {"seconds": 0}


@of(["ft", "base_at", "bibau_t", "bibau_u", "ibu", "nad", "nc", "bti_dbf", "pam"])
def test_every_parameter_and_running_statistic_of_the_purified_model_has_moved(name, purified, backdoored):
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), purified(name).variables, backdoored.variables)
    assert all(jax.tree.leaves(moved))


def test_another_key_gives_other_batches(purified, backdoored):
    assert purify("ft", backdoored, seed=1).history[0]["loss"] != purified("ft").history[0]["loss"]


@of([name for name in taking("padding") if name not in ("ep", "bnp")], long=())
def test_crops_and_flips_are_those_that_were_asked_for(name, backdoored, monkeypatch):
    asked = []

    def record(key, pixels, *, padding, flip):
        asked.append((padding, flip))
        return pixels

    def look(step, state, data, *, frozen=(), key, **rest):
        jax.eval_shape(step, state, frozen, data, key)
        raise InterruptedError

    for module in (train, bibau, ibu, anp, rnp, nad, bti_dbf, inversion):
        monkeypatch.setattr(module, "crop_and_flip", record)
    monkeypatch.setattr(train, "fit", look)
    with pytest.raises(InterruptedError):
        purify(name, backdoored, padding=3, flip=True)
    assert asked == [(3, True)]


@of(defenses.names(), long=())
def test_nothing_of_the_attack_is_asked_for(name):
    parameters = inspect.signature(defenses.get(name).purify).parameters
    assert list(parameters)[:4] == ["key", "classifier", "variables", "clean"]
    assert not {"attack", "trigger", "stamp", "test", "aim"} & set(parameters)
    extra = {"ibu": "triggered", "ep": "poisoned"}.get(name, "")
    assert all(p.default is not p.empty for p in parameters.values() if p.kind is p.KEYWORD_ONLY and p.name != extra)
    assert ("triggered" in parameters) == (name == "ibu") == defenses.is_ideal(name)
    assert ("poisoned" in parameters) == (name == "ep") == defenses.is_informed(name)


@EVERY
def test_what_sees_the_trigger_says_so_in_the_type_of_what_it_gives(name, purified):
    assert isinstance(purified(name), defenses.Ideal) == defenses.is_ideal(name)
    assert isinstance(purified(name), defenses.Informed) == defenses.is_informed(name)


@pytest.mark.parametrize("name", defenses.names())
def test_the_config_lists_every_default_as_the_signature_has_it(name):
    config = base.get_config()
    section = config.defense.to_dict() | {option: config.data[option] for option in ("padding", "flip")}
    section["pgd"] = Perturbation(**section["pgd"])
    parameters = list(inspect.signature(defenses.get(name).purify).parameters.values())[4:]
    of_the_run = {"held_out", "journal", "triggered", "poisoned", "targeted"}
    for parameter in parameters:
        if parameter.name not in of_the_run and (name, parameter.name) != ("base_at", "ablation"):
            listed = section.get(name, {}) if parameter.name in section.get(name, {}) else section
            assert listed[parameter.name] == parameter.default, parameter.name
    assert set(section.get(name, {})) <= {parameter.name for parameter in parameters}


def test_every_setting_of_the_defence_section_is_taken_by_some_defence():
    settings = {name for name, value in base.defense().to_dict().items() if not isinstance(value, dict)}
    assert settings - {"name", "beside", "max_seconds"} <= {
        option for name in defenses.names() for option in (inspect.signature(defenses.get(name).purify).parameters)
    }


@of([*PRUNE, "nc", "bti_dbf"])
def test_what_it_found_out_is_told(name, purified):
    told = purified(name).told
    if name in PRUNE:
        assert 0 <= told["pruned"] <= told["channels"] == 48
    assert ("threshold" in told) == (name in ("anp", "rnp"))
    assert json.loads(json.dumps(told)) == told
    if name == "nc":
        assert told["flagged"] == [0] and told["anomaly_index"] > 1.5


@of(regenerate.QUICK, long=("bti_dbf", "pam"))
def test_a_few_steps_give_the_golden_values(name):
    golden = json.loads((regenerate.FOLDER / "defenses.json").read_text())[name]
    found = regenerate.few_steps(name)
    assert found == pytest.approx(golden, rel=2e-3, abs=2e-4), regenerate.HOW


@pytest.mark.parametrize("name", ["base_at", "bibau_t", "bibau_u"])
def test_samples_are_adversarial_images_of_clean_ones_within_the_bound(name, purified, backdoored):
    samples = purified(name).samples
    originals = backdoored.clean.take(samples["rows"])
    assert samples["adversarial"].dtype == np.uint8 and len(samples["rows"]) == 8
    distance = np.sqrt(((samples["adversarial"].astype(float) - originals.images) ** 2).sum((1, 2, 3)))
    assert (distance > 50).all() and (distance <= 400 + 8).all()  # half a grey level a pixel is rounding
    if name == "bibau_t":
        assert (originals.labels != 0).all()


# --- what is refused


@of([name for name in defenses.names() if name not in ("clp", "ep")], long=())  # those look at no clean images
@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: c.take(slice(0)), "the defender's clean set is empty"),
        (
            lambda c: ImageSet(c.images[:, :12], c.labels, c.ids),
            r"clean images are \[12, 16, 1\], the network takes \[16, 16, 1\]",
        ),
        (lambda c: ImageSet(c.images, c.labels + 1, c.ids), "labels of the clean set lie outside the network's 10 classes"),
        (lambda c: ImageSet(c.images, c.labels - 1, c.ids), "labels of the clean set lie outside the network's 10 classes"),
    ],
)
def test_a_clean_set_that_does_not_fit_is_refused(name, change, words, backdoored):
    with pytest.raises(UserError, match=words):
        purify(name, backdoored, clean=change(backdoored.clean))


@of(taking("schedule"), long=())
def test_an_unknown_schedule_is_refused(name, backdoored):
    with pytest.raises(UserError, match='schedule "cosin" is unknown'):
        purify(name, backdoored, schedule="cosin")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"ablation": "A"}, r'ablation "A" is unknown; choose one of base_at, \+A, \+B, \+A\+B'),
        ({"pgd": Perturbation(norm="l0")}, 'pgd.norm "l0" is unknown; choose one of l2, linf, l1'),
        ({"pgd": Perturbation(start="one")}, 'pgd.start "one" is unknown; choose one of zero, random'),
        ({"prior_form": "angle"}, 'prior_form "angle" is unknown; choose one of cosine, inner'),
        ({"iewc_form": "log"}, 'iewc_form "log" is unknown; choose one of clip, neg_log, hinge'),
        ({"balance": -0.1}, "balance must not be negative"),
        ({"softened": 1.1}, "eta, alpha and softened must lie within 0..1"),
        ({"attack_form": "logit"}, 'attack_form "logit" is unknown; choose one of cross_entropy, margin'),
        ({"unlearning_labels": "false"}, 'unlearning_labels "false" is unknown; choose one of predicted, true'),
        ({"fisher_refresh": "step"}, 'fisher_refresh "step" is unknown; choose one of never, epoch'),
        ({"pgd": Perturbation(epsilon=0.0)}, "pgd.epsilon and pgd.step_size must be positive"),
        ({"pgd": Perturbation(step_size=-1.0)}, "pgd.epsilon and pgd.step_size must be positive"),
        ({"pgd": Perturbation(steps=-1)}, "pgd.steps at least 0"),
        ({"pgd": Perturbation(fooled=1.5)}, "pgd.fooled must lie within 0..1"),
        ({"pgd": Perturbation(block=0)}, "pgd.block must be at least 1"),
        ({"pgd": Perturbation(aimed=1.1)}, "pgd.aimed must lie within 0..1"),
        ({"pgd": Perturbation(aimed=0.5), "target_label": 10}, r"target label 10 is outside the 10 classes 0\.\.9"),
        ({"iewc_cap": 0.0}, "iewc_cap and temperature must be positive"),
        ({"eta": 1.5}, "eta, alpha and softened must lie within 0..1"),
    ],
)
def test_bibau_refuses_settings_that_mean_nothing(options, words, backdoored):
    with pytest.raises(UserError, match=words):
        purify("bibau_u", backdoored, **options)


def test_a_target_outside_the_classes_is_refused_in_targeted_mode_alone(backdoored):
    with pytest.raises(UserError, match=r"target label 10 is outside the 10 classes 0\.\.9"):
        purify("bibau_t", backdoored, target_label=10)


@pytest.mark.parametrize("name", ["bibau", "protocol", "bibau_x"])
def test_an_unknown_defence_is_refused_with_the_known_ones(name):
    with pytest.raises(UserError, match=f'unknown defence "{name}"; known: {", ".join(defenses.names())}'):
        defenses.get(name)
