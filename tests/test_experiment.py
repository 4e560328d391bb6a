"""Whole runs on a few digits: what is left on disk, what is done again, what is shared, and what is refused."""

import dataclasses
import importlib
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bibau_jax import attacks, checkpoint, defenses, experiment, keys, preflight, records, train, workdir
from bibau_jax.attacks import badnets, issba
from bibau_jax.data import splits
from bibau_jax.errors import Diverged, NotApplicable, UserError
from bibau_jax.report import __main__ as command
from bibau_jax.stages import checks, evaluate
from tests import regenerate

WITH_ALL = {"implant.clean_twin": "train", "defense.beside": "ft"}


@pytest.fixture(scope="module")
def finished(tiny_config, tmp_path_factory):
    """A run of all stages, with a clean twin and a second defence: (config, folder, record)."""
    config, folder = tiny_config(WITH_ALL), tmp_path_factory.mktemp("runs") / "finished"
    return config, folder, experiment.run(config, str(folder), "the command")


@pytest.fixture
def copy(finished, tmp_path):
    """The same, to be changed: (config, folder, record)."""
    config, folder, record = finished
    shutil.copytree(folder, tmp_path / "run")
    return config, tmp_path / "run", record


def snapshot(folder) -> dict:
    """Bytes and time of every file."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def model(folder, stage) -> str:
    """The digest of a stage's parameters."""
    return checkpoint.load(folder / stage / "model")[1]["sha256"]


# --- what a run leaves


def test_the_record_holds_what_is_needed_to_trust_and_repeat_the_run(finished, digits):
    config, folder, record = finished
    entry = json.loads((folder / "record.json").read_text())
    assert workdir.differences(entry["config"], config, ignore=()) == []
    assert entry["seed"] == 0 and entry["command"] == "the command"
    assert entry["versions"]["jax"] == jax.__version__ and {"python", "flax", "numpy"} <= entry["versions"].keys()
    assert entry["device"]["platform"] == jax.default_backend() and entry["device"]["processes"] == 1
    assert entry["stages"].keys() == {"implant", "clean", "purify/bibau_u", "purify/ft", "evaluate"}
    assert all(stage["seconds"] > 0 and stage["peak_memory_mb"] > 0 for stage in entry["stages"].values())
    others = int(np.sum(digits.test.labels != 0))
    assert {name: row["defense"] for name, row in entry["metrics"].items()} == {
        "backdoored": "none",
        "clean": "clean",
        "purified": "bibau_u",
        "finetuned": "ft",
    }
    for row in entry["metrics"].values():
        assert [row["counts"][rate][1] for rate in ("ca", "asr", "robust_accuracy")] == [500, others, others]
        assert all(0 <= row[rate] <= 100 for rate in ("ca", "asr", "robust_accuracy"))
        assert row["seconds"] > 0
    assert record == records.read(folder / "record.json")


def test_every_file_of_the_run_is_there_and_no_checkpoint_is_left(finished):
    _, folder, _ = finished
    for name in ("config.json", "report.html", "metrics.jsonl", "strip.npz", "implant/poison.npz"):
        assert (folder / name).is_file(), name
    assert not [path for path in folder.rglob("*") if path.name.startswith(".") or path.name.endswith(".part")]
    assert not list(folder.rglob("checkpoints/*"))
    stages = [line["stage"] for line in records.read_lines(folder / "metrics.jsonl")]
    assert stages == ["implant", "clean", "purify/bibau_u", "purify/ft"]
    assert "BI-BAU" in (folder / "report.html").read_text()


def test_the_poisoned_samples_can_be_found_again(finished, digits):
    config, folder, _ = finished
    flags = np.load(folder / "implant" / "poison.npz")
    assert flags["poisoned"].sum() == round(0.1 * 200) and len(flags["ids"]) == 200
    at = {image: place for place, image in enumerate(digits.train.ids.tolist())}
    rows = [at[image] for image in flags["ids"].tolist()]
    np.testing.assert_array_equal(digits.train.labels[rows], flags["original_labels"])
    assert (flags["labels"][flags["poisoned"]] == 0).all()


def test_the_strip_shows_images_of_the_defender_and_what_the_models_see(finished, digits):
    config, folder, _ = finished
    strip = np.load(folder / "strip.npz")
    divided = splits.divide(keys.stream(keys.root(0), "data"), digits.train, train_size=200, clean_size=40, validation_size=20)
    mine = {image.tobytes(): label for image, label in zip(divided.clean.images, divided.clean.labels, strict=True)}
    for image, label in zip(strip["clean"], strip["labels"], strict=True):
        assert mine[image.tobytes()] == label
    assert strip["adversarial"].shape == strip["triggered"].shape == strip["clean"].shape
    assert (strip["triggered"][:, -3:, -3:] == 255).all()
    assert {"clean_by_backdoored", "clean_by_purified", "triggered_by_purified", "class_names"} <= set(strip.files)


def test_the_twin_is_trained_on_the_same_images_in_the_same_order_without_poison(finished, tiny_config, tmp_path):
    """With next to no poison the backdoored model comes close to the twin; the poison is all that tells them apart."""
    _, folder, _ = finished
    experiment.run(tiny_config({"attack.poison_ratio": 0.005}, stages="implant"), str(tmp_path / "run"))
    twin, full, little = (
        checkpoint.load(place)[0]["variables"]["params"]["head"]["kernel"]
        for place in (folder / "clean" / "model", folder / "implant" / "model", tmp_path / "run" / "implant" / "model")
    )
    assert 0 < np.linalg.norm(little - twin) < 0.5 * np.linalg.norm(full - twin)


# --- whether it is gone

EVERY_CHECK = "retuning,query,bec,orthogonality,universal,square,linearity,path,features"


@pytest.fixture(scope="module")
def attacked(tiny_config, tmp_path_factory):
    """A run with every check of `reactivate`: (config, folder, record)."""
    changes = {"implant.clean_twin": "train", "defense.name": "ft", "defense.beside": "ibu", "reactivate.checks": EVERY_CHECK}
    config, folder = tiny_config(changes), tmp_path_factory.mktemp("runs") / "attacked"
    return config, folder, experiment.run(config, str(folder), "the command")


def test_every_check_leaves_its_numbers_with_every_model_it_is_made_of(attacked):
    _, folder, record = attacked
    numbers = {"r_asr", "r_ca", "q_asr", "q_clean", "q_twin", "q_twin_clean", "u_asr", "u_clean", "s_asr", "s_clean"}
    geometry = {"bec", "bec_squashed", "orthogonality", "orthogonality_signed", "linearity", "linearity_random"}
    for name in ("purified", "clean", "ibu"):
        extra = record.metrics[name].extra
        assert numbers | geometry <= extra.keys()
        assert all(0 <= extra[number] <= 100 for number in numbers)
        assert len(extra["r_asr_each"]) == 2 and np.mean(extra["r_asr_each"]) == pytest.approx(extra["r_asr"])
        assert extra["r_poisoned"] == 5 and 0 < extra["s_queries"] <= 3 * 100
        assert [len(extra[name]) for name in ("path", "path_asr", "path_ca", "path_asr_recalibrated")] == [3] * 4
    for row in ("ft", "ibu", "clean", "none"):
        with np.load(folder / "reactivate" / row / "features.npz") as saved:
            assert [len(saved[name]) for name in ("clean", "triggered", "labels")] == [30] * 3 and 1 <= len(
                saved["target"]
            ) <= 10
            assert saved["clean"].shape[1] == saved["triggered"].shape[1] == 4
    undefended = record.metrics["backdoored"].extra
    assert geometry <= undefended.keys() and not numbers & undefended.keys()
    assert undefended["bec"] == pytest.approx(1, abs=1e-5)
    assert record.metrics["clean"].extra["bec"] == pytest.approx(0, abs=1e-5)
    assert {"reactivate/ft", "reactivate/ibu", "reactivate/clean", "reactivate/none"} <= record.stages.keys()


def test_retuning_is_given_exactly_its_images(attacked):
    config, folder, _ = attacked
    this = experiment.Run(config, folder)
    draws = [checks.for_retuning(this, this.attack, number) for number in (0, 1)]
    for benign, poisoned in draws:
        assert (len(benign), len(poisoned)) == (35, 5)
        assert not set(benign.ids) & set(poisoned.ids)
        originals = this.splits.train.take(np.array([np.flatnonzero(this.splits.train.ids == i)[0] for i in poisoned.ids]))
        np.testing.assert_array_equal(originals.ids, poisoned.ids)
        assert (poisoned.labels == 0).all() and (originals.labels != 0).all()
        np.testing.assert_array_equal(poisoned.images, this.attack.stamp(originals.images, originals.ids))
    assert set(draws[0][1].ids) != set(draws[1][1].ids)


def test_a_check_that_is_added_later_only_adds(attacked, tiny_config, tmp_path):
    config, folder, record = attacked
    few = tiny_config(workdir.flat(config) | {"reactivate.checks": "retuning"})
    few["stages"] = "implant,purify,evaluate,reactivate"
    first = experiment.run(few, str(tmp_path / "run"))
    assert "q_asr" not in first.metrics["purified"].extra
    before = snapshot(tmp_path / "run")
    more = experiment.run(few | {"reactivate": few["reactivate"] | {"checks": "retuning,bec"}}, str(tmp_path / "run"))
    after = snapshot(tmp_path / "run")
    assert {path.name for path in after if after[path] != before.get(path)} <= {"record.json", "config.json", "made_of"}
    for name in ("purified", "clean", "ibu"):
        assert more.metrics[name].extra["r_asr_each"] == first.metrics[name].extra["r_asr_each"]
        assert more.metrics[name].extra["bec"] == pytest.approx(record.metrics[name].extra["bec"], abs=1e-6)


def test_the_settings_of_a_check_are_free_until_it_is_made(attacked, tiny_config, tmp_path):
    config, _, _ = attacked
    few = tiny_config(workdir.flat(config) | {"reactivate.checks": "bec"})
    experiment.run(few, str(tmp_path / "run"))
    other = tiny_config(workdir.flat(few) | {"reactivate.checks": "bec,path", "reactivate.path.points": 2})
    record = experiment.run(other, str(tmp_path / "run"))
    assert len(record.metrics["purified"].extra["path"]) == 2 and record.config["reactivate"]["path"]["points"] == 2
    for settings in ({"reactivate.path.points": 4}, {"reactivate.bec.share": 0.5}, {"reactivate.test_size": 50}):
        with pytest.raises(UserError, match=f"another config .{next(iter(settings))}: "):
            experiment.run(tiny_config(workdir.flat(other) | settings), str(tmp_path / "run"))


def test_few_images_and_a_trigger_for_every_class_have_features_too(tiny_config, tmp_path, capsys):
    changes = {
        "implant.clean_twin": "train",
        "defense.name": "ft",
        "attack.mode": "all_to_all",
        "reactivate.features.images": 1,
    }
    changes |= {"reactivate.checks": "features,query", "defense.beside": "", "implant.epochs": 2}
    record = experiment.run(tiny_config(changes), str(tmp_path / "run"))
    assert record.metrics["purified"].extra["features_images"] == 2  # no class is spared, so none is the target's alone
    assert "q_asr" in record.metrics["purified"].extra and "q_asr" not in record.metrics["clean"].extra
    assert "the clean twin without query, for want of another clean model" in "".join(capsys.readouterr())
    assert command.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0


@pytest.mark.slow
def test_an_attack_that_was_cut_off_goes_on_where_it_was(attacked, tmp_path, monkeypatch):
    config, _, record = attacked
    config = config | {"reactivate": config["reactivate"] | {"checks": "retuning,query"}}

    def cut_off(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checks.query, "learn", cut_off)
        experiment.run(config, str(tmp_path / "run"))
    done = records.read(tmp_path / "run" / "record.json").metrics
    assert "r_asr" in done["clean"].extra and "q_asr" not in done["clean"].extra
    last = experiment.run(config, str(tmp_path / "run"))
    for name in ("purified", "clean", "ibu"):
        for number in ("r_asr", "q_asr", "q_twin"):
            assert last.metrics[name].extra[number] == record.metrics[name].extra[number]


@pytest.mark.parametrize("version", ["this", "one that had no budget of queries"])
def test_what_is_known_of_a_shared_model_and_twin_is_taken_over(version, attacked, tiny_config, tmp_path):
    config, folder, record = attacked
    if version != "this":
        folder = shutil.copytree(folder, tmp_path / "older")
        entry = json.loads((folder / "record.json").read_text())
        del entry["config"]["reactivate"]["query"]["budget"]
        (folder / "record.json").write_text(json.dumps(entry))
    changes = workdir.flat(config) | {"implant.reuse": str(folder), "implant.clean_twin": str(folder), "defense.beside": ""}
    last = experiment.run(tiny_config(changes | {"defense.epochs": 2}), str(tmp_path / "run"))
    for name in ("clean", "backdoored"):
        assert last.metrics[name].extra == record.metrics[name].extra
        assert f"reactivate/{last.metrics[name].defense}" not in last.stages
    assert last.metrics["purified"].extra["r_asr_each"] and "reactivate/ft" in last.stages


def test_settings_may_be_chosen_on_images_that_are_held_out(attacked, tiny_config, tmp_path):
    config, folder, record = attacked
    changes = workdir.flat(config) | {"implant.reuse": str(folder), "implant.clean_twin": str(folder), "defense.beside": ""}
    config = tiny_config(changes | {"measured_on": "validation", "reactivate.checks": "retuning"})
    last = experiment.run(config, str(tmp_path / "run"))
    held_out = experiment.Run(config, tmp_path).splits.validation
    others = int(np.sum(held_out.labels != 0))
    for row in last.metrics.values():
        assert (row.ca.count, row.asr.count) == (len(held_out), others) == (20, others)
    told = last.metrics["clean"].extra
    assert told["reactivation_images"] == others != record.metrics["clean"].extra["reactivation_images"]
    assert "reactivate/clean" in last.stages  # what the other run found on test images is not taken over


def test_a_run_does_not_mind_other_settings_of_attacks_that_are_not_its_own(copy, tiny_config):
    _, folder, record = copy
    assert experiment.run(tiny_config(WITH_ALL | {"attack.wanet.strength": 3.0}), str(folder)).metrics == record.metrics
    with pytest.raises(UserError, match="attack.badnets.size"):
        experiment.run(tiny_config(WITH_ALL | {"attack.badnets.size": 2}), str(folder))


def test_a_model_that_was_purified_anew_is_attacked_anew(attacked, tmp_path):
    config, folder, _ = attacked
    shutil.copytree(folder, tmp_path / "run")
    path = tmp_path / "run" / "purify" / "ft" / "model"
    tree, info = checkpoint.load(path)
    shutil.rmtree(path)
    info.pop("sha256")
    tree["variables"]["params"]["head"]["bias"] += 1.0
    tree["variables"]["params"]["head"]["bias"][0] += 30.0  # now everything is a 0
    checkpoint.save(path, tree, info)
    last = experiment.run(config, str(tmp_path / "run"))
    assert last.metrics["purified"].asr.percent == 100 and last.metrics["purified"].extra["u_asr"] == 100
    assert last.metrics["ibu"] == records.read(folder / "record.json").metrics["ibu"]


def test_without_a_clean_twin_the_checks_that_need_one_are_left_out_and_said_so(tiny_config, tmp_path, capsys):
    config = tiny_config({"defense.name": "ft", "reactivate.checks": "query,bec,orthogonality"})
    record = experiment.run(config, str(tmp_path / "run"))
    assert "reactivate: without query, bec, for want of a clean twin" in "".join(capsys.readouterr())
    assert "orthogonality" in record.metrics["purified"].extra and "bec" not in record.metrics["purified"].extra


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"reactivate.checks": "retuning,magic"}, 'reactivate.checks: "magic" is unknown'),
        ({"reactivate.checks": "retuning", "reactivate.retuning.repeats": 0}, "reactivate.retuning.repeats must be positive"),
        ({"reactivate.checks": "retuning", "reactivate.retuning.poisoned": 40}, "needs more than 40 images in all"),
        ({"reactivate.checks": "query", "reactivate.query.epsilon": -1.0}, "reactivate.query.epsilon must be positive"),
        ({"reactivate.checks": "query", "reactivate.query.gradient": "x"}, "reactivate.query.gradient must be one of"),
        ({"reactivate.checks": "query", "reactivate.query.epsilon": 300.0}, "reactivate.query.epsilon must be at most 255"),
        ({"reactivate.checks": "query", "reactivate.retuning.images": 0}, "reactivate.retuning.images must be positive"),
        ({"reactivate.checks": "universal", "reactivate.universal.epsilon": 0.5}, "universal.epsilon must be at least 1 grey"),
        ({"reactivate.checks": "bec", "reactivate.bec.share": 3.0}, "reactivate.bec.share must be at most 1"),
        ({"reactivate.checks": "bec", "reactivate.test_size": 1}, "the checks need 4 images that can be attacked, and"),
        ({"reactivate.test_size": -1}, "reactivate.test_size must not be negative"),
        ({"defense.name": "ibu"}, "sees the trigger and is no defence"),
        ({"defense.name": "bti_dbf", "defense.bti_dbf.batch_size": 0}, "defense.bti_dbf.batch_size must be at least 1, got 0"),
        ({"defense.beside": "nad", "defense.nad.teacher_rate": -0.1}, "defense.nad.teacher_rate must be positive, got -0.1"),
        ({"defense.beside": "rnp", "defense.rnp.recover_rate": 0.0}, "defense.rnp.recover_rate must be positive, got 0.0"),
        ({"defense.beside": "rnp", "defense.rnp.max_grad_norm": -1.0}, "rnp needs epochs of at least 1, unlearned within 0..1"),
        (
            {"defense.beside": "nad", "defense.nad.drops": ("a", 2)},
            r"defense.nad.drops is \['a', 2\]; it must hold finite numbers",
        ),
        ({"defense.beside": "nad", "defense.nad.betas": (float("nan"),)}, r"defense.nad.betas is \[nan\]; it must hold finite"),
        ({"defense.name": "ft", "defense.ft.epochs": -3}, "defense.ft.epochs must be at least 1, got -3"),
        (
            {"defense.beside": "ibu", "defense.ibu.lambda_clean": -1.0},
            "defense.ibu.lambda_clean must not be negative, got -1.0",
        ),
        ({"defense.beside": "nad", "defense.nad.momentum": 1.0}, "defense.nad.momentum must not be negative, and below 1"),
        ({"defense.beside": "nad", "defense.nad.cutout": -1}, "nad needs a cutout that is not negative"),
        ({"defense.name": "ft", "defense.cutout": -1}, "defense.cutout must not be negative"),
        ({"defense.max_seconds": -1.0}, "defense.max_seconds and data.clean_ratio must not be negative"),
        ({"data.clean_ratio": -0.1}, "defense.max_seconds and data.clean_ratio must not be negative"),
        ({"measured_on": "train"}, 'measured_on "train" is unknown; choose test or validation'),
        ({"measured_on": "validation", "data.validation_size": 0}, "needs data.validation_size above 0"),
    ],
)
def test_checks_that_cannot_be_made_are_refused_before_anything_is_written(changes, words, tiny_config, tmp_path):
    with pytest.raises(UserError, match=words):
        experiment.run(tiny_config(changes), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_models_without_measurements_are_not_attacked(tiny_config, tmp_path):
    config = tiny_config({"defense.name": "ft", "reactivate.checks": "retuning"}, stages="implant,purify,reactivate")
    with pytest.raises(UserError, match='run the stage "evaluate" first'):
        experiment.run(config, str(tmp_path / "run"))


# --- what is done again


def test_a_second_start_changes_no_file(copy):
    config, folder, record = copy
    before = snapshot(folder)
    assert experiment.run(config, str(folder), "another command") == record
    after = snapshot(folder)
    assert {path: file[0] for path, file in after.items()} == {path: file[0] for path, file in before.items()}
    # The page is made anew from the record each time, and comes out the same.
    assert {path.name for path in after if after[path] != before[path]} <= {"report.html"}


def test_stages_one_at_a_time_give_the_same_models_as_all_at_once(finished, tiny_config, tmp_path):
    _, folder, record = finished
    for stage in ("implant", "purify", "evaluate", "reactivate", "report"):
        last = experiment.run(tiny_config(WITH_ALL, stages=stage), str(tmp_path / "run"))
    for stage in ("implant", "clean", "purify/bibau_u", "purify/ft"):
        assert model(tmp_path / "run", stage) == model(folder, stage)
    assert {name: dataclasses.replace(row, seconds=0) for name, row in last.metrics.items()} == {
        name: dataclasses.replace(row, seconds=0) for name, row in record.metrics.items()
    }


def test_a_model_that_was_scanned_before_it_was_measured_gets_its_rates_and_keeps_the_scan(tiny_config, tmp_path):
    scanned = {"scan.images": 20, "scan.batch_size": 10, "scan.epochs": 1}
    first = experiment.run(tiny_config(scanned, stages="implant,scan"), str(tmp_path / "run"))
    assert first.metrics["backdoored"].asr is None
    measured = experiment.run(tiny_config(scanned, stages="purify,evaluate"), str(tmp_path / "run")).metrics["backdoored"]
    assert measured.asr.count > 0 and measured.ca == first.metrics["backdoored"].ca
    assert measured.extra == first.metrics["backdoored"].extra


def test_a_defence_that_is_added_later_only_adds(copy, tiny_config):
    _, folder, record = copy
    before = snapshot(folder)
    both = experiment.run(tiny_config(WITH_ALL | {"defense.beside": "ft,base_at"}), str(folder))
    after = snapshot(folder)
    kept = {path for path in before if path.parent != folder}
    assert kept and all(after[path] == before[path] for path in kept)
    assert both.metrics.keys() - record.metrics.keys() == {"base_at"}
    assert {name: both.metrics[name] for name in record.metrics} == record.metrics
    assert both.stages["implant"] == record.stages["implant"]


def test_a_resumed_stage_costs_what_it_took_before_it_was_cut_off_too(tiny_config, tmp_path, monkeypatch):
    config = tiny_config({"implant.epochs": 4}, stages="implant")
    real, saves = checkpoint.Keeper.save, []

    def save(keeper, step, tree, info):
        real(keeper, step, tree, info | {"history": [entry | {"seconds": 1000.0} for entry in info["history"]]})
        saves.append(step)
        if step == 16:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.Keeper, "save", save)
    with pytest.raises(KeyboardInterrupt):
        experiment.run(config, str(tmp_path / "run"))
    monkeypatch.undo()
    record = experiment.run(config, str(tmp_path / "run"))
    assert saves[-1] == 16 and 3000 < record.stages["implant"].seconds < 3100


# --- what is shared between runs


def test_the_backdoored_model_and_the_twin_of_another_run_can_be_taken(finished, tiny_config, tmp_path):
    _, folder, record = finished
    taken = {"implant.reuse": str(folder), "implant.clean_twin": str(folder), "defense.eta": 0.25}
    found = experiment.run(tiny_config(taken), str(tmp_path / "run"))
    assert not (tmp_path / "run" / "implant").exists() and not (tmp_path / "run" / "clean").exists()
    for name in ("backdoored", "clean"):
        assert found.metrics[name] == record.metrics[name]
    assert model(tmp_path / "run", "purify/bibau_u") != model(folder, "purify/bibau_u")


def test_a_defence_may_be_run_on_the_clean_twin_to_see_what_it_costs(finished, tiny_config, tmp_path):
    _, folder, record = finished
    taken = {"implant.reuse": str(folder), "implant.innocent": True, "defense.name": "ft", "defense.beside": "ep"}
    found = experiment.run(tiny_config(taken), str(tmp_path / "run"))
    assert found.metrics["backdoored"].ca == record.metrics["clean"].ca != record.metrics["backdoored"].ca
    assert found.metrics["backdoored"].asr == record.metrics["clean"].asr
    assert found.metrics["ep"].extra["channels"] == 12
    with pytest.raises(UserError, match="takes the clean twin of another run; name it by implant.reuse"):
        experiment.run(tiny_config({"implant.innocent": True}), str(tmp_path / "other"))


@pytest.mark.parametrize(
    "setting, change, words",
    [
        ("reuse", {"implant.epochs": 2}, "implant.epochs: 1 -> 2"),
        ("reuse", {"attack.poison_ratio": 0.2}, "attack.poison_ratio: 0.1 -> 0.2"),
        ("clean_twin", {"seed": 3}, "seed: 0 -> 3"),
        ("clean_twin", {"data.train_size": 199}, "data.train_size: 200 -> 199"),
    ],
)
@pytest.mark.parametrize("stages", ["implant", "purify,evaluate"])
def test_a_model_of_other_settings_is_not_taken(finished, tiny_config, tmp_path, stages, setting, change, words):
    _, folder, _ = finished
    with pytest.raises(UserError, match=f"implant.{setting}=.* was trained with other settings .*{words}"):
        config = tiny_config({f"implant.{setting}": str(folder)} | change, stages=stages)
        experiment.run(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()  # found out before anything was trained


def test_the_twin_may_be_shared_among_attacks(finished, tiny_config, tmp_path):
    _, folder, _ = finished
    config = tiny_config({"attack.name": "blended", "implant.clean_twin": str(folder)}, stages="implant")
    experiment.run(config, str(tmp_path / "run"))
    assert (tmp_path / "run" / "implant" / "model").exists() and not (tmp_path / "run" / "clean").exists()


def test_a_model_that_is_not_there_is_named(tiny_config, tmp_path):
    with pytest.raises(UserError, match='run has no finished "implant" model; run that stage first'):
        experiment.run(tiny_config(stages="purify"), str(tmp_path / "run"))
    with pytest.raises(UserError, match="nowhere/config.json cannot be read as a run's config"):
        experiment.run(tiny_config({"implant.reuse": str(tmp_path / "nowhere")}), str(tmp_path / "other"))
    with pytest.raises(UserError, match="holds no record: nothing was measured there yet"):
        experiment.run(tiny_config(stages="report"), str(tmp_path / "run2"))


# --- what is refused


def test_the_folder_of_another_config_is_refused_with_the_difference_and_stays_as_it_is(copy, tiny_config):
    _, folder, _ = copy
    before = snapshot(folder)
    with pytest.raises(UserError, match=r"holds a run of another config \(defense.eta: 0.5 -> 0.1; seed: 0 -> 4\)"):
        experiment.run(tiny_config(WITH_ALL | {"seed": 4, "defense.eta": 0.1}), str(folder))
    assert snapshot(folder) == before


def test_a_run_of_an_earlier_version_goes_on_where_the_new_settings_do_what_was_done(copy, tiny_config):
    config, folder, _ = copy
    older = workdir.read_config(folder)
    for section, name in (("model", "weights"), ("model", "normalisation"), ("defense", "max_seconds"), ("defense", "nad")):
        older[section].pop(name)
    older.pop("scan")
    (folder / "config.json").write_text(json.dumps(older))
    longer = tiny_config(WITH_ALL | {"defense.max_seconds": 60.0, "model.normalisation": "auto"})
    names = r"defense.max_seconds: None -> 60.0; model.normalisation: None -> auto\)"
    with pytest.raises(UserError, match=rf"holds a run of another config \({names}"):
        experiment.run(longer, str(folder))
    experiment.run(config, str(folder))
    assert workdir.read_config(folder) == json.loads(json.dumps(experiment.settled(config)))


def test_the_defence_may_still_change_until_something_was_purified(copy, tiny_config):
    _, folder, _ = copy
    shutil.rmtree(folder / "purify")
    changed = tiny_config(WITH_ALL | {"defense.eta": 0.1}, stages="implant")
    experiment.run(changed, str(folder))
    assert workdir.read_config(folder)["defense"]["eta"] == 0.1
    with pytest.raises(UserError, match=r"another config \(implant.epochs: 1 -> 2\)"):
        experiment.run(tiny_config(WITH_ALL | {"implant.epochs": 2}), str(folder))


def test_models_purified_anew_are_measured_anew(copy, tiny_config):
    _, folder, record = copy
    shutil.rmtree(folder / "purify")
    found = experiment.run(tiny_config(WITH_ALL | {"defense.learning_rate": 0.01}), str(folder))
    assert found.config["defense"]["learning_rate"] == 0.01
    for name in ("purified", "finetuned"):
        assert found.metrics[name].extra["model_sha256"] != record.metrics[name].extra["model_sha256"]
    assert found.metrics["clean"] == record.metrics["clean"]


def test_what_a_stage_cost_is_told_again_after_a_kill_between_model_and_record(copy):
    config, folder, record = copy
    (folder / "record.json").unlink()
    assert experiment.run(config, str(folder), record.command) == dataclasses.replace(
        record, stages=record.stages | {"evaluate": records.read(folder / "record.json").stages["evaluate"]}
    )


def test_a_damaged_record_is_found_before_anything_is_computed(copy):
    config, folder, _ = copy
    shutil.rmtree(folder / "purify")
    (folder / "record.json").write_text('{"config": {"da')
    before = snapshot(folder)
    with pytest.raises(UserError, match="record.json is not a record: not valid JSON"):
        experiment.run(config, str(folder))
    assert snapshot(folder) == before


@pytest.mark.slow
def test_every_defence_runs_beside_the_main_one_and_is_measured(finished, tiny_config, tmp_path, monkeypatch, capsys):
    """All of them in a few steps; one that cannot treat the network is left out, and said so."""
    _, folder, _ = finished
    quick = {"epochs": 1, "teacher_epochs": 1, "inversion_epochs": 1, "iterations": 1, "unlearn_epochs": 1, "recover_epochs": 1}
    section = tiny_config()["defense"]
    beside = [name for name in defenses.names() if name not in ("ft", "bibau_u", "bibau_t", "base_at", "bti_dbf", "pam", "nad")]
    changes = {
        f"defense.{n}.{o}": v for n in beside for o, v in quick.items() if isinstance(section.get(n), dict) and o in section[n]
    }
    changes |= {"implant.reuse": str(folder), "defense.name": "ft", "defense.beside": ",".join([*beside, "nad"])}

    def refuse(classifier):
        raise NotApplicable("this network has no stages")

    monkeypatch.setattr(defenses.get("nad"), "check_network", refuse)
    record = experiment.run(tiny_config(changes), str(tmp_path / "run"))
    assert record.metrics.keys() == {"backdoored", "purified", *beside}
    assert "purify/nad: not applicable: this network has no stages" in "".join(capsys.readouterr())
    assert record.metrics["anp"].extra["channels"] == record.metrics["ep"].extra["channels"] == 12
    assert isinstance(record.metrics["nc"].extra["flagged"], list)
    with np.load(tmp_path / "run" / "purify" / "nc" / "evidence.npz") as evidence:
        assert evidence["masks"].shape == (10, 16, 16, 1)
    assert not list((tmp_path / "run").rglob("checkpoints/*"))


def test_a_defence_that_diverges_is_told_and_costs_the_others_nothing(finished, tiny_config, tmp_path, monkeypatch, capsys):
    config, folder, _ = finished

    def diverge(*given, **options):
        raise Diverged("nad: the loss is nan at step 2")

    monkeypatch.setattr(defenses.get("nad"), "purify", diverge)
    changes = {"implant.reuse": str(folder), "defense.name": "ft", "reactivate.checks": ""}
    record = experiment.run(tiny_config(changes | {"defense.beside": "nad,clp"}), str(tmp_path / "run"))
    assert record.metrics.keys() == {"backdoored", "purified", "clp"}
    assert record.metrics["backdoored"].extra["diverged"] == {"nad": "nad: the loss is nan at step 2"}
    assert "purify/nad: diverged: nad: the loss is nan at step 2" in "".join(capsys.readouterr())
    with pytest.raises(Diverged):
        experiment.run(tiny_config(changes | {"defense.name": "nad", "defense.beside": ""}), str(tmp_path / "alone"))


def test_time_that_runs_out_is_told(finished, tiny_config, tmp_path):
    _, folder, _ = finished
    changes = {"implant.reuse": str(folder), "defense.name": "ft", "defense.epochs": 3, "defense.max_seconds": 1e-9}
    record = experiment.run(tiny_config(changes | {"reactivate.checks": ""}), str(tmp_path / "run"))
    assert record.metrics["purified"].extra["out_of_time"] is True


def test_settings_of_a_defence_that_a_run_does_not_have_are_free(copy, tiny_config):
    config, folder, record = copy
    given = tiny_config(WITH_ALL | {"defense.sau.epochs": 3})
    assert workdir.differences(config, given, ignore=()) == []
    assert experiment.run(given, str(folder)).metrics == record.metrics
    with_sau = tiny_config(WITH_ALL | {"defense.beside": "ft,sau", "defense.sau.epochs": 4})
    told = workdir.differences(given, with_sau, ignore=("defense.beside",))
    assert told == ["defense.sau.epochs: 3 -> 4"]
    workdir.claim(folder, with_sau)  # sau has not begun
    (folder / "purify" / "sau").mkdir()
    with pytest.raises(UserError, match=r"defense.sau.epochs: 4 -> 5\)"):
        workdir.claim(folder, tiny_config(WITH_ALL | {"defense.beside": "ft,sau", "defense.sau.epochs": 5}))


def test_clean_images_without_a_class_are_refused(tiny_config, tmp_path):
    run = experiment.Run(tiny_config(), tmp_path)
    clean = run.splits.clean
    run.__dict__["splits"] = dataclasses.replace(run.splits, clean=clean.take(clean.labels != 3))
    with pytest.raises(UserError, match="the defender's clean images have none of class 3, which every defence would forget"):
        preflight.check(run, ["purify"])


def test_the_defenders_images_may_be_a_share_of_the_training_images(tiny_config, tmp_path):
    run = experiment.Run(tiny_config({"data.clean_ratio": 0.1}), tmp_path)
    assert len(run.splits.clean) == 20 and len(run.splits.train) == 200


def test_an_ablation_is_told_by_its_name(tiny_config, tmp_path):
    found = experiment.run(tiny_config({"defense.ablation": "+A"}), str(tmp_path / "run"))
    assert found.metrics["purified"].defense == "bibau_u:+A"
    assert "BI-BAU (U), +A" in (tmp_path / "run" / "report.html").read_text()


def test_what_does_not_change_results_may_differ(copy, tiny_config):
    _, folder, record = copy
    free = {"checkpoint_every": 50, "data.download": False, "data.data_dir": "/elsewhere", "data.gtsrb.roi": True}
    assert experiment.run(tiny_config(WITH_ALL | free, stages="evaluate"), str(folder)).metrics == record.metrics


def test_a_folder_that_is_no_run_is_refused_and_stays_as_it_is(tiny_config, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="exists and is not a run of this program; choose another --workdir"):
        experiment.run(tiny_config(), str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


# --- an attack that takes a hand in training


def test_what_an_attack_learns_while_implanting_is_what_it_stamps_at_the_test(tiny_config, tmp_path, monkeypatch):
    def make(key, poison_ratio=0.1, **options):
        def finish(attack, extra):
            shade = int(extra["shade"])
            return dataclasses.replace(attack, stamp=lambda x, index: np.minimum(x, 255 - shade) + np.uint8(shade))

        def prepare(extra, batch, key, augment):
            return batch["images"] + extra["shade"], batch["labels"], 0.01 * (extra["shade"] - 60.0) ** 2, extra

        init = {"shade": jnp.float32(10.0)}
        control = attacks.Control(lambda key, split, journal, augment: (init, []), finish, prepare, optax.sgd(10.0))
        return dataclasses.replace(badnets.make(key, poison_ratio=poison_ratio, **options), control=control)

    monkeypatch.setattr(attacks, "get", lambda name: SimpleNamespace(make=make))
    config = tiny_config({"implant.epochs": 4}, stages="implant,purify,evaluate")
    experiment.run(config, str(tmp_path / "run"))
    learned = checkpoint.load(tmp_path / "run" / "implant" / "model")[0]["extra"]["shade"]
    assert 30 < learned < 100
    strip = np.load(tmp_path / "run" / "strip.npz")
    assert (strip["triggered"].min((1, 2, 3)) == int(learned)).all()


TAKES_LONG = ("iad", "issba", "narcissus")  # they train networks of their own


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in TAKES_LONG)) for name in attacks.names()]
)
def test_every_attack_is_implanted_and_leaves_behind_what_it_poisoned(name, tiny_config, tmp_path, monkeypatch):
    small = {
        "iad": {"attack.iad.width": 2, "attack.iad.mask_epochs": 1},
        "issba": {"attack.issba.width": 2, "attack.issba.epochs": 4, "attack.issba.wait": 0, "attack.issba.ramp": 3},
        "narcissus": {"attack.narcissus.width": 2, "attack.narcissus.surrogate_epochs": 1, "attack.narcissus.epochs": 1},
        "patch": {"attack.patch.file": regenerate.own_trigger((16, 16, 1))["file"]},
    }
    monkeypatch.setattr(issba, "BIT_ACCURACY", 0.0)
    monkeypatch.setattr(issba, "PSNR", 0.0)
    options = {"attack.name": name, "attack.poison_ratio": 0.05, "implant.epochs": 1} | small.get(name, {})
    config = tiny_config(options, stages="implant")
    experiment.run(config, str(tmp_path / "run"))
    assert not list((tmp_path / "run").rglob("checkpoints/*"))
    found = np.load(tmp_path / "run" / "implant" / "poison.npz")
    assert found["poisoned"].sum() == 10 and len(found["ids"]) == 200
    changed = found["labels"] != found["original_labels"]
    assert not (changed & ~found["poisoned"]).any() and (changed.any() or name in ("sig", "narcissus"))
    assert checkpoint.load(tmp_path / "run" / "implant" / "model")[1]["seconds"] > 0
    again = experiment.poisoned_split(experiment.Run(config, tmp_path / "run"))
    for flag, values in again.flags().items():
        np.testing.assert_array_equal(values, found[flag])
    assert found["seed"] == 0 and found["poison_ratio"] == 0.05 and again.images.shape == (200, 16, 16, 1)


def test_a_poisoned_set_that_cannot_be_made_again_is_refused(copy):
    config, folder, _ = copy
    path = folder / "implant" / "poison.npz"
    with np.load(path) as saved:
        arrays = dict(saved)
    for changed in ({"poisoned": arrays["poisoned"][::-1]}, {"means": arrays["means"] + 1}):
        np.savez(path, **arrays | changed)
        with pytest.raises(UserError, match="poison.npz holds another poisoned set than this version of bibau_jax makes"):
            experiment.poisoned_split(experiment.Run(config, folder))


@pytest.mark.parametrize("name, own", [("badnets", 0.1), ("sig", 0.08), ("narcissus", 0.05), ("enhanced_adap_blend", 0.01)])
def test_a_poison_ratio_left_to_the_attack_is_that_of_its_section_and_is_told(name, own, tiny_config):
    config = tiny_config({"attack.name": name, "attack.poison_ratio": 0.0})
    assert experiment.settled(config)["attack"]["poison_ratio"] == own
    assert config["attack"]["poison_ratio"] == 0.0  # the caller's is left alone
    assert experiment.settled(tiny_config({"attack.name": name, "attack.poison_ratio": 0.2}))["attack"]["poison_ratio"] == 0.2


def test_sizes_left_open_are_the_networks_own_and_are_told():
    config = importlib.import_module("configs.base").get_config()
    sizes = {"resnet18": (64, (2, 2, 2, 2)), "vgg19_bn": (64, (2, 2, 4, 4, 4)), "vit_b_32": (768, (12,))}
    for config.model.name, size in sizes.items():
        section = experiment.settled(config.to_dict())["model"]
        assert (section["width"], section["stages"]) == size
    config.model.stages = (1, 1)
    assert experiment.settled(config.to_dict())["model"]["stages"] == (1, 1)


def test_a_share_of_the_class_is_told_in_the_place_of_a_ratio(tiny_config, tmp_path):
    config = tiny_config({"attack.name": "sig", "attack.poison_ratio": 0.0, "attack.sig.class_share": 0.5}, stages="implant")
    record = experiment.run(config, str(tmp_path / "run"))
    assert record.config["attack"]["poison_ratio"] == 0.0
    saved = np.load(tmp_path / "run" / "implant" / "poison.npz")
    assert saved["poison_ratio"] == saved["poisoned"].mean() > 0.03


@pytest.mark.slow
def test_what_a_trigger_cost_is_counted_when_the_victims_training_is_done_later(tiny_config, tmp_path, monkeypatch):
    small = {"attack.name": "iad", "attack.iad.width": 2, "attack.iad.mask_epochs": 2, "implant.epochs": 1}
    config, fit = tiny_config(small, stages="implant"), train.fit

    def cut_off(*args, journal, **options):
        if journal.stage == "implant":
            raise KeyboardInterrupt
        state, history = fit(*args, journal=journal, **options)
        return state, [entry | {"seconds": 1000.0} for entry in history]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "fit", cut_off)
        experiment.run(config, str(tmp_path / "run"))
    record = experiment.run(config, str(tmp_path / "run"))
    assert record.stages["implant"].seconds > 2000


def test_a_run_without_a_defence_is_measured_and_reported(tiny_config, tmp_path, capsys):
    config = tiny_config({"implant.clean_twin": "train"}, stages="implant,evaluate,report")
    record = experiment.run(config, str(tmp_path / "run"))
    assert record.metrics.keys() == {"backdoored", "clean"}
    assert "evaluate: without purify/bibau_u, not done yet" in "".join(capsys.readouterr())
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
    more = experiment.run(config | {"stages": "purify,evaluate"}, str(tmp_path / "run"))
    assert more.metrics.keys() == {"backdoored", "clean", "purified"}
    assert more.metrics["backdoored"] == record.metrics["backdoored"]


def test_poisoned_images_are_stamped_once_and_then_cropped_with_the_others(tiny_config, tmp_path, monkeypatch):
    seen, fit = [], train.fit
    monkeypatch.setattr(
        train, "fit", lambda step, state, data, **options: seen.append((step, data)) or fit(step, state, data, **options)
    )
    config = tiny_config({"data.padding": 2}, stages="implant")
    experiment.run(config, str(tmp_path / "run"))
    (step, data), flags = seen[0], np.load(tmp_path / "run" / "implant" / "poison.npz")
    chosen = np.flatnonzero(flags["poisoned"])
    assert (data["images"][chosen][:, -3:, -3:] == 255).all()
    batch = {"images": data["images"][chosen], "labels": data["labels"][chosen]}
    pixels, labels, _, _ = step.keywords["prepare"]((), batch, keys.root(0))
    moved = (np.asarray(pixels)[:, -3:, -3:] != 255).any(axis=(1, 2, 3))
    assert 0.5 < moved.mean() < 1 and (labels == 0).all()  # the crop took part of most triggers with it


@pytest.mark.slow
@pytest.mark.parametrize("name", attacks.names())
def test_every_attack_takes_with_the_settings_for_the_digits(name, tmp_path):
    config = importlib.import_module("configs.digits").get_config(name).to_dict()
    config["implant"]["clean_twin"] = "none"
    record = experiment.run(config | {"stages": "implant,evaluate"}, str(tmp_path / "run"))
    assert record.metrics["backdoored"].asr.percent > evaluate.HARDLY and record.metrics["backdoored"].ca.percent > 90
