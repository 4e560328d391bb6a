"""A stranger's checkpoint from its file to a purified one in the same format: every stage, on a network with a backdoor."""

import ast
import dataclasses
import hashlib
import importlib
import io
import re
import shutil

import numpy as np
import pytest
import rich.console

from bibau_jax import checkpoint, experiment, keys, own, preflight, records, train
from bibau_jax.attacks import patch
from bibau_jax.data import splits
from bibau_jax.defenses import inversion
from bibau_jax.errors import UserError
from bibau_jax.importers import export, suspect, torch_file
from bibau_jax.report import card
from bibau_jax.report import own as report
from bibau_jax.run import Run, load_model
from bibau_jax.stages import export as stage_export
from bibau_jax.stages import purify, scan, verify
from bibau_jax.workdir import read_config

QUICK = {
    "data.padding": 1,
    "model.name": "resnet18",  # of one stage, as here, it has the keys of resnet20
    "model.normalisation": "given",
    "model.mean": (0.305,),
    "model.std": (0.376,),
    "scan.images": 150,
    "scan.epochs": 60,
    "scan.batch_size": 50,
    "scan.enough": 0.9,
    "scan.patience": 2,
    "defense.epochs": 12,
    "defense.batch_size": 40,
    "defense.learning_rate": 0.1,
    "defense.lambda_kd": 0.03,
    "defense.lambda_iewc": 5.0,
    "reactivate.retuning.images": 96,
    "reactivate.retuning.batch_size": 48,
    "reactivate.retuning.repeats": 1,
    "reactivate.query.images": 60,
    "reactivate.query.epochs": 5,
    "reactivate.query.hidden": 64,
    "verify.target_label": 0,
}


def pytorch_names(variables) -> dict[str, np.ndarray]:
    """The arrays of a ResNet under PyTorch's names and in its layouts, behind `module.`, with its counters."""
    leaves = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    made = {}
    for collection in variables.values():
        for path, value in torch_paths(collection):
            *module, leaf = path
            name = ".".join(part.replace("_", ".") if part.startswith("layer") else part for part in module)
            name = name.replace("head", "linear").replace("shortcut_conv", "shortcut.0").replace("shortcut_bn", "shortcut.1")
            value = np.asarray(value)
            turn = {4: (3, 2, 0, 1), 2: (1, 0)}.get(value.ndim, (0,))
            made[f"module.{name}.{leaves[leaf]}"] = np.ascontiguousarray(value.transpose(turn))
            if leaf == "var":
                made[f"module.{name}.num_batches_tracked"] = np.array(12, np.int64)
    return made


def torch_paths(tree, path=()):
    """(path, leaf) of nested dicts."""
    for name, value in tree.items():
        yield from torch_paths(value, (*path, name)) if isinstance(value, dict) else [((*path, name), value)]


@pytest.fixture(scope="module")
def stranger(backdoored, tmp_path_factory):
    """A folder with what somebody has who downloaded a model: its weights, clean images; and what only the attacker has."""
    folder = tmp_path_factory.mktemp("stranger")
    export.write(folder / "suspect.pth", pytorch_names(backdoored.variables))
    np.savez(folder / "clean.npz", images=backdoored.clean.images, labels=backdoored.clean.labels)
    np.savez(folder / "test.npz", images=backdoored.test.images, labels=backdoored.test.labels)
    mask = np.zeros((16, 16, 1), np.uint8)
    mask[-3:, -3:] = 1
    np.savez(folder / "trigger.npz", mask=mask, pattern=255 * mask)
    return folder


@pytest.fixture(scope="module")
def settings(stranger):
    """The settings of a whole run in seconds, as a plain dict."""

    def make(changes=None):
        config = importlib.import_module("configs.own_model").get_config()
        given = {"model.weights": str(stranger / "suspect.pth"), "data.folder": str(stranger / "clean.npz")}
        given |= {"data.test": str(stranger / "test.npz"), "verify.trigger": str(stranger / "trigger.npz")}
        config.update_from_flattened_dict(QUICK | given | (changes or {}))
        return config.to_dict()

    return make


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    """(folder, record) of a run done to the end."""
    folder = tmp_path_factory.mktemp("runs") / "own"
    return folder, experiment.run(settings(), str(folder), "python -m bibau_jax.main")


def test_the_scan_names_the_attackers_class_and_purification_takes_its_trigger_away(finished):
    _, record = finished
    before, after = (record.metrics[name] for name in ("backdoored", "purified"))
    assert before.extra["scan"]["suspected"] == 0 and before.extra["scan"]["flagged"] == [0]
    assert before.asr.percent > 90 and after.asr.percent < 20
    assert after.ca.percent > 60  # of 200 images to purify with
    assert before.extra["stand_in_asr"] > 80 > after.extra["stand_in_asr"]
    for name in ("r_asr", "q_asr", "stand_in_r_asr", "stand_in_q_asr"):
        assert 0 <= after.extra[name] <= 100 and name not in before.extra
    assert after.extra["scan"]["suspected"] != 0 or not after.extra["scan"]["flagged"]


def test_the_stand_in_works_before_and_after_fine_tuning(finished, stranger):
    folder, _ = finished
    run = Run(read_config(folder), folder)
    mask, pattern = patch.read(folder / "verify" / "stand_in" / "trigger.npz")
    scanned = np.load(folder / "scan" / "triggers.npz")
    assert not np.array_equal(mask, scanned["masks"][0])
    test = np.load(stranger / "test.npz")
    attack = patch.of_arrays(run.key, mask, pattern, target_label=0, num_classes=10)
    images = attack.stamp(test["images"], np.arange(len(test["labels"])))
    tuned = checkpoint.load(folder / "verify" / "stand_in" / "tuned" / "model")[0]["variables"]
    for variables in (load_model(run, "implant")[0], tuned):
        assert np.mean(train.predict(run.classifier, variables, images)[test["labels"] != 0] == 0) > 0.8


def test_what_is_given_back_has_the_names_layouts_and_types_that_came(finished, stranger):
    folder, record = finished
    came, back = torch_file.read(stranger / "suspect.pth"), torch_file.read(folder / "export" / "suspect_purified.safetensors")
    assert back.prefix == came.prefix == "module." and set(back.arrays) == set(came.arrays)
    for name, array in came.arrays.items():
        assert back.arrays[name].dtype == array.dtype and back.arrays[name].shape == array.shape
        assert (back.arrays[name] == array).all() == name.endswith("num_batches_tracked"), name
    digest = hashlib.sha256((folder / "export" / "suspect_purified.safetensors").read_bytes()).hexdigest()
    card = (folder / "export" / "suspect_purified.safetensors.md").read_text()
    assert digest in card and record.metrics["backdoored"].extra["sha256"] in card and "strict=True" in card


def test_the_purified_file_is_a_model_like_any_other(finished, settings, tmp_path):
    folder, record = finished
    path = folder / "export" / "suspect_purified.safetensors"
    again = experiment.run(settings({"model.weights": str(path), "scan.epochs": 2, "stages": "scan"}), str(tmp_path / "again"))
    assert again.metrics["backdoored"].ca == record.metrics["purified"].ca


def test_the_page_tells_verdict_evidence_and_what_is_not_known(finished):
    folder, _ = finished
    page = (folder / "report.html").read_text()
    assert "The model as it came is suspicious: a patch of about" in page and "What is not known" in page
    assert page.count("data:image/png") >= 14 and "<caption>What stood in for the trigger</caption>" in page
    assert not re.search(r"\b(None|nan)\b", re.sub(r'"data:[^"]*"', "", page))


def test_a_second_start_finds_everything_done(finished, settings):
    folder, record = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert experiment.run(settings(), str(folder), record.command).metrics == record.metrics
    changed = {path.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed <= {"record.json", "report.html", "suspect_purified.safetensors.md"}


def test_another_file_in_its_place_is_refused(finished, settings, backdoored, stranger):
    folder, _ = finished
    other = stranger / "other.pth"
    arrays = pytorch_names(backdoored.variables)
    export.write(other, arrays | {"module.linear.bias": arrays["module.linear.bias"] + 1})
    with pytest.raises(UserError, match="of another config|not the file"):
        experiment.run(settings({"model.weights": str(other)}), str(folder))


def test_a_scale_that_images_cannot_tell_from_a_commoner_one_must_be_named():
    tried = suspect._candidates("auto", (), (), 3)
    assert "imagenet" in tried and "tiny_imagenet" not in tried
    assert list(suspect._candidates("tiny_imagenet", (), (), 3)) == ["tiny_imagenet"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model.weights": "nowhere.pth"}, "nowhere.pth: No such file"),
        ({"data.folder": ""}, "which images"),
        ({"data.folder": "nowhere"}, "nowhere does not exist"),
        ({"defense.beside": "ibu"}, "ibu sees the trigger"),
        ({"defense.beside": "ep"}, "ep sees the trigger"),
        ({"model.name": "vgg19_bn"}, "vgg19_bn"),
        ({"model.normalisation": "zscore"}, 'model.normalisation "zscore" is unknown'),
        ({"verify.target_label": 10}, "target label 10 is outside"),
        ({"verify.trigger": "nowhere.npz"}, "holds no trigger"),
        ({"verify.trigger": "{folder}/cut.npz"}, "cut.npz holds no trigger"),
        ({"export.format": "onnx"}, 'export.format "onnx" is unknown'),
        ({"verify.target_label": -1}, "which class does verify.trigger lead to"),
        ({"model.weights": "", "model.name": "auto"}, "which model\\? set --config.model.weights"),
        ({"stages": "scan,evaluate"}, 'the stage "evaluate" is about an attack that was implanted here'),
        ({"stages": "verify"}, 'the stage "verify" comes after purify, and nothing is purified yet'),
        ({"stages": "scan,export"}, 'the stage "export" comes after purify'),
        ({"scan.enough": 0.0}, "enough within 0..1"),
        ({"scan.batch_size": 0}, "scan.images and scan.batch_size must be at least 1"),
        ({"scan.share": -0.5}, "scan.limit and scan.share must not be negative"),
        ({"data.held_out": 1.0}, "data.held_out must lie between 0 and 1"),
        ({"defense.max_loss": -1.0}, "max_loss must not be negative"),
        ({"stages": "scan,verify,bless"}, 'unknown stage "bless"'),
        ({"reactivate.query.gradient": "foo"}, "reactivate.query.gradient must be one of"),
        ({"reactivate.retuning.repeats": 0}, "reactivate.retuning.repeats must be positive, got 0"),
        ({"reactivate.retuning.epochs": 0}, "reactivate.retuning.epochs must be positive, got 0"),
        ({"reactivate.query.epsilon": -5.0}, "reactivate.query.epsilon must be positive, got -5.0"),
        ({"scan.memory": 0.0}, "scan.memory must be positive"),
        ({"model.heads": 4}, "model.heads is no setting of resnet18"),
        ({"model.width": 16}, "model.width is told by the file of weights"),
        ({"data.channels": 2}, "data.channels must be 3"),
        ({"verify.trigger": "{folder}/faint.npz"}, "faint.npz changes no pixel of the first images"),
        ({"verify.trigger": "", "verify.target_label": 10}, "verify.target_label 10 is outside 0..9"),
        ({"stages": " , "}, "which stages\\?"),
        ({"stages": "report"}, "holds no record: nothing was measured there yet"),
        ({"model.std": (0.0,)}, "model.std must be positive"),
    ],
)
def test_what_is_wrong_is_one_line_before_anything_is_written(changes, message, settings, stranger, tmp_path):
    (tmp_path / "cut.npz").write_bytes((stranger / "trigger.npz").read_bytes()[:300])
    np.savez(tmp_path / "faint.npz", mask=np.full((16, 16, 1), 1e-6), pattern=np.full((16, 16, 1), 255.0))
    changes = {name: value.format(folder=tmp_path) if isinstance(value, str) else value for name, value in changes.items()}
    with pytest.raises(UserError, match=message) as error:
        experiment.run(settings(changes), str(tmp_path / "run"))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_weights_that_only_guess_are_refused(settings, backdoored, stranger, tmp_path):
    labels = (backdoored.clean.labels + 3) % 10
    np.savez(tmp_path / "shifted.npz", images=backdoored.clean.images, labels=labels)
    with pytest.raises(UserError, match="hardly more than guessing"):
        experiment.run(settings({"data.folder": str(tmp_path / "shifted.npz")}), str(tmp_path / "run"))


def test_nothing_is_exported_over_the_file_that_came(settings, stranger, tmp_path):
    came = (stranger / "suspect.pth").read_bytes()
    given = {"export.path": str(stranger / "suspect.pth"), "export.format": "pth"}
    with pytest.raises(UserError, match="nothing is ever written over it"):
        experiment.run(settings(given), str(tmp_path / "run"))
    assert (stranger / "suspect.pth").read_bytes() == came


@pytest.mark.parametrize("name", ["mine.safetensors", "mine.safetensors.md"])
def test_neither_weights_nor_card_go_over_what_is_there(name, settings, tmp_path):
    (tmp_path / name).write_text("my own notes")
    with pytest.raises(UserError, match=f"{name} exists already; nothing is overwritten"):
        experiment.run(settings({"export.path": str(tmp_path / "mine.safetensors")}), str(tmp_path / "run"))
    assert (tmp_path / name).read_text() == "my own notes" and not (tmp_path / "run").exists()


def test_classes_without_images_are_named_before_they_are_unlearned(settings, stranger, tmp_path):
    with np.load(stranger / "clean.npz") as held:
        images, labels = held["images"], held["labels"]
    for left, words in ((labels < 8, "classes 8, 9"), (labels != 3, "class 3")):
        np.savez(tmp_path / "few.npz", images=images[left], labels=labels[left])
        given = {"data.folder": str(tmp_path / "few.npz"), "data.test": ""}
        with pytest.raises(UserError, match=f"there are no clean images of {words}; a network purified without"):
            experiment.run(settings(given), str(tmp_path / "run"))


def test_what_was_found_out_about_the_file_is_said_and_doubts_with_it(settings, stranger, tmp_path, capsys):
    with np.load(stranger / "clean.npz") as held:
        images, labels = held["images"], held["labels"]
    swapped = np.array([0, 1, 2, 3, 4, 5, 6, 7, 9, 8])[labels]
    few = np.concatenate([np.flatnonzero(labels == label)[:6] for label in range(10)])
    np.savez(tmp_path / "few.npz", images=images[few], labels=swapped[few])
    given = {"data.folder": str(tmp_path / "few.npz"), "stages": "import", "defense.max_loss": 5.0}
    told = experiment.run(settings(given), str(tmp_path / "run")).config and capsys.readouterr().err
    assert "import: resnet18 (zip, without module.), 10 classes, pixels scaled as " in told
    assert "% of the clean images right" in told and "There are only 60 clean images, 48 of them to " in told
    assert "images: 48 to scan and train with, 12 held out; models are measured on" in told
    assert "The model hardly knows images of classes 8, 9; are the classes in the order of its outputs?" in told


@pytest.mark.parametrize(
    ("changes", "held_out"),
    [
        ({}, 0),
        ({"data.test": ""}, 40),
        ({"measured_on": "validation"}, 40),
        ({"defense.max_loss": 5.0}, 40),
        ({"defense.beside": "ft,rnp"}, 40),
    ],
)
def test_images_are_held_out_where_something_is_measured_or_chosen_by_them(settings, changes, held_out, tmp_path):
    divided = experiment.Run(settings(changes), tmp_path).splits
    assert (len(divided.clean), len(divided.validation)) == (200 - held_out, held_out)


@pytest.mark.parametrize("row", ["bibau_t", "bibau_u", "base_at"])
def test_the_scans_class_is_waited_for(row, settings, tmp_path):
    given = {"defense.name": row, "defense.pgd.aimed": 0.5, "stages": "purify"}
    (tmp_path / "run" / "scan" / "checkpoints").mkdir(parents=True)  # as a scan leaves it that was cut off
    with pytest.raises(UserError, match=f"{row} needs the attacker's class: run the stage scan first"):
        purify.apply(experiment.Run(settings(given), tmp_path / "run"), row, {}, None)


@pytest.mark.parametrize(
    "index, label, share", [([0.5, -1.0, 7.0], 2, 0.5), ([0.5, 1.9, 1.0], 1, 0.0), ([-np.inf] * 3, 0, 0.0)]
)
def test_images_are_aimed_at_the_class_that_the_scan_suspects_if_it_stands_out(index, label, share, settings, tmp_path):
    run = experiment.Run(settings({"defense.pgd.aimed": 0.5}), tmp_path)
    (tmp_path / "scan").mkdir()
    np.savez(tmp_path / "scan" / "triggers.npz", index=np.array(index))
    options = run.options("bibau_u")
    assert (options["target_label"], options["pgd"].aimed) == (label, share)
    if not np.isfinite(index).any():
        with pytest.raises(UserError, match="the scan found no trigger for any"):
            purify.apply(run, "bibau_t", {}, None)


def test_stages_of_a_strangers_model_need_its_file(tiny_config, tmp_path):
    for stage in ("verify", "export"):
        with pytest.raises(UserError, match="--config.model.weights"):
            experiment.run(tiny_config(stages=stage), str(tmp_path / stage))


def judged(sizes):
    """The verdict on triggers of these sizes, on images of 16x16."""
    masks = np.zeros((len(sizes), 16, 16, 1))
    return scan.judged(scan.inversion.Triggers(masks, masks, np.array(sizes), np.zeros(len(sizes))))


def test_a_class_without_a_trigger_is_never_flagged():
    found = judged([30.0, 31.0, 29.0, np.inf, 30.5])
    assert found.told["sizes"][3] == -1 and found.told["indices"][3] is None and found.suspected != 3 and not found.flagged
    assert (found.told["found"], found.told["undetermined"]) == (4, False)


@pytest.mark.parametrize(
    "sizes, suspected",
    [([np.inf] * 10, -1), ([9.0] + [np.inf] * 9, 0), ([200.0, 9.0] + [np.inf] * 8, 1)],
)
def test_a_scan_that_found_too_few_triggers_cannot_tell(sizes, suspected, finished):
    found = judged(sizes)
    assert (
        found.is_undetermined
        and not found.flagged
        and found.suspected == suspected
        and (found.told["anomaly_index"] is None) == (suspected < 0)
    )
    _, record = finished
    before = record.metrics["backdoored"]
    before = dataclasses.replace(before, extra=before.extra | {"scan": found.told})
    record = dataclasses.replace(record, metrics={"backdoored": before})
    assert "The scan cannot tell: for" in report.verdict(record)
    for stages, status in (("scan", 2), ("report,import, scan", 2), ("scan,purify", 0), ("import", 0)):
        assert experiment.status({"stages": stages}, record) == status


def test_two_classes_cannot_be_compared_and_are_no_reason_to_stop(finished):
    _, record = finished
    found, before = judged([9.0, 200.0]), record.metrics["backdoored"]
    assert found.is_undetermined and not found.flagged and found.suspected == 0
    before = dataclasses.replace(before, extra=before.extra | {"scan": found.told})
    record = dataclasses.replace(record, metrics={"backdoored": before})
    assert report.verdict(record) == "The scan cannot tell: it compares classes with each other, and two are too few."
    after = finished[1].metrics["purified"]
    for rate, begins in (
        (100.0, "Whether a backdoor is left in the purified model cannot be told: do not deploy it"),
        (2.0, "The scan"),
    ):
        left = {"stand_in_asr": rate, "stand_in_r_asr": rate, "stand_in_q_asr": rate}
        measured = {"backdoored": before, "purified": dataclasses.replace(after, asr=None, extra=after.extra | left)}
        told = report.verdict(dataclasses.replace(record, metrics=measured))
        assert told.startswith(begins) and "ordinary shortcut" not in told
    assert dict(cell[:2] for cell in report.rows(record)[0][1])["Flagged by the scan"] == "cannot tell"


@pytest.mark.parametrize(
    "rates, flagged, words",
    [
        ({"asr": 3.0, "r_asr": 5.0, "q_asr": 4.0}, [], "The backdoor is gone from the purified model, as far as was tried."),
        ({"asr": 30.0, "r_asr": 5.0, "q_asr": 4.0}, [], "The backdoor is still in the purified model: do not deploy it."),
        ({"asr": 3.0, "r_asr": 5.0, "q_asr": 40.0}, [], "The backdoor is hidden and not gone, for it can be called back"),
        ({"asr": 3.0, "r_asr": 5.0, "q_asr": 4.0}, [2], "The purified model is still suspicious"),
        ({"stand_in_asr": 30.0}, [], "What the scan found is still in the purified model"),
        ({"stand_in_asr": 3.0, "stand_in_r_asr": 4.0}, [], "What the scan found is gone from the purified model"),
        ({"stand_in_asr": 3.0, "stand_in_r_asr": 4.0}, None, "Whether what the scan found is gone cannot be told"),
        ({"came": 12.0, "stand_in_asr": 3.0, "stand_in_r_asr": 4.0}, [], "Whether what the scan found is gone cannot be told"),
    ],
)
def test_the_verdict_begins_with_how_it_ended(rates, flagged, words, finished):
    _, record = finished
    before, after = (record.metrics[name] for name in ("backdoored", "purified"))
    again = after.extra["scan"] | {"flagged": flagged or [], "undetermined": flagged is None}
    rates = dict(rates)
    came = before.extra | {"stand_in_asr": rates.pop("came", before.extra["stand_in_asr"])}
    before = dataclasses.replace(before, extra=came)
    extra = {name: value for name, value in after.extra.items() if not name.endswith("asr")} | {"scan": again}
    asr = records.Rate(round(10 * rates["asr"]), 1000) if "asr" in rates else None
    after = dataclasses.replace(after, asr=asr, extra=extra | {name: rate for name, rate in rates.items() if name != "asr"})
    told = dataclasses.replace(record, metrics={"backdoored": before, "purified": after})
    assert report.verdict(told).startswith(words)
    if flagged:
        assert "Scanned again, the purified model has suspicious class 2" in report.verdict(told)
    tried = "Two attacks tried to call the backdoor back" in " ".join(report.unknown(told))
    back = [rate for name, rate in rates.items() if name.endswith(("r_asr", "q_asr"))]
    assert tried == bool(back and max(back) <= 20.0)


def test_what_is_asked_for_later_is_done_without_another_run(finished, settings, tmp_path):
    folder, record = finished
    given = settings({"export.format": "pth", "stages": "export"})
    assert experiment.run(given, str(folder), record.command).metrics == record.metrics
    assert "suspect_purified.pth" in (folder / "export" / "suspect_purified.pth.md").read_text()
    marked = settings({"verify.trigger": "", "stages": "import"})
    experiment.run(marked, str(tmp_path / "run"))
    (tmp_path / "run" / "verify").mkdir()
    experiment.run(settings({"stages": "import"}), str(tmp_path / "run"))  # the trigger became known
    with pytest.raises(UserError, match="verify.trigger"):
        experiment.run(marked, str(tmp_path / "run"))


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run, to go on with otherwise."""
    return shutil.copytree(finished[0], tmp_path / "run")


def test_settings_that_a_result_was_made_with_stay(copied, settings):
    with pytest.raises(UserError, match="reactivate.retuning.poisoned: 5 -> 60"):
        experiment.run(settings({"reactivate.retuning.poisoned": 60}), str(copied))


def test_another_trigger_is_measured_anew_and_so_is_a_model_that_was_purified_anew(copied, finished, settings, tmp_path):
    mask = np.zeros((16, 16, 1), np.uint8)
    mask[:2, :2] = 1
    np.savez(tmp_path / "other.npz", mask=mask, pattern=40 * mask)
    other = {"verify.trigger": str(tmp_path / "other.npz"), "stages": "verify,report"}
    wrong = experiment.run(settings(other), str(copied))
    assert wrong.metrics["backdoored"].asr.percent < 20
    assert "It hardly works on the model as it came" in (copied / "report.html").read_text()
    retuned = copied / "verify" / "real" / "bibau_u" / "retuned_0" / "model" / "manifest.json"
    with_wrong = retuned.read_bytes()
    for name in ("purify", "export"):
        shutil.rmtree(copied / name)
    given = settings({"defense.epochs": 1, "stages": "purify,verify"})
    record, (_, first) = experiment.run(given, str(copied)), finished
    assert record.metrics["backdoored"].asr == first.metrics["backdoored"].asr
    digests = {each.metrics["purified"].extra["model_sha256"] for each in (wrong, record)}
    assert len(digests) == 2 and retuned.read_bytes() != with_wrong
    stood = "verify/stand_in/bibau_u/retuned_0/model/manifest.json"
    assert (copied / stood).read_bytes() != (finished[0] / stood).read_bytes()


def test_other_images_under_the_same_name_are_refused(settings, stranger, tmp_path):
    path, given = tmp_path / "clean.npz", {"data.folder": str(tmp_path / "clean.npz"), "stages": "import"}
    with np.load(stranger / "clean.npz") as held:
        arrays = dict(held)
    np.savez(path, **arrays)
    experiment.run(settings(given), str(tmp_path / "run"))
    experiment.run(settings(given), str(tmp_path / "run"))
    np.savez(path, **{name: array[:-20] for name, array in arrays.items()})
    with pytest.raises(UserError, match="are not those that .*run began with"):
        experiment.run(settings(given), str(tmp_path / "run"))


def test_a_limit_that_nothing_kept_is_said(settings, tmp_path, capsys):
    given = {"defense.name": "clp", "defense.clp.u": 0.1, "defense.max_loss": 2.0, "stages": "purify,export"}
    experiment.run(settings(given), str(tmp_path / "run"))
    assert "The limit on the loss of clean accuracy was passed, and nothing within it was made" in capsys.readouterr().err
    card = (tmp_path / "run" / "export" / "suspect_purified.safetensors.md").read_text()
    assert "- By: CLP of bibau_jax" in card and "Nothing was measured" in card and "The purified model was not measured" in card


def test_nothing_foreign_is_taken_for_the_runs_own(copied, finished, settings, tmp_path):
    place = tmp_path / "deploy.safetensors"
    given = settings({"export.path": str(place), "stages": "export"})
    place.write_text("somebody else's")
    with pytest.raises(UserError, match="deploy.safetensors exists already; nothing is overwritten"):
        experiment.run(given, str(copied))
    shutil.copy(finished[0] / "export" / "suspect_purified.safetensors", place)
    card = tmp_path / "deploy.safetensors.md"
    card.write_text("my own notes")
    with pytest.raises(UserError, match="deploy.safetensors.md exists already"):
        experiment.run(given, str(copied))
    assert card.read_text() == "my own notes"
    card.unlink()
    for _ in range(2):  # its own card is written again
        experiment.run(given, str(copied))
        assert "Purified" in card.read_text() or "BI-BAU" in card.read_text()
    place.unlink()  # and so is a file that was deleted, whose card stayed
    experiment.run(given, str(copied))
    assert place.exists() and torch_file.sha256(place) in card.read_text()


@pytest.mark.parametrize("file", ["scan/triggers.npz", "verify/stand_in/trigger.npz"])
def test_damaged_arrays_of_a_run_are_told_in_one_line(file, copied, settings):
    path = copied / file
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=f"{path.name} cannot be read .*: delete it and run its stage again"):
        experiment.run(settings({"stages": "report"}), str(copied))


def test_a_stand_in_that_only_the_scan_found_is_called_a_weak_test(copied, finished, monkeypatch):
    run, (_, record) = Run(read_config(copied), copied), finished
    found = scan.read(copied / "scan" / "triggers.npz")
    (copied / "verify" / "stand_in" / "trigger.npz").unlink()
    none = found.triggers._replace(sizes=np.full(1, np.inf))
    monkeypatch.setattr(scan, "searched", lambda *given, **options: none)
    arrays = verify.stand_in(run, found, {})
    assert arrays["from_scan"] and np.array_equal(arrays["mask"], found.triggers.masks[0])
    before = record.metrics["backdoored"]
    assert "once it is fine-tuned" in report.stood_in(record) and "weak" not in report.stood_in(record)
    before = dataclasses.replace(before, extra=before.extra | {"stand_in_from_scan": True})
    assert "that is a weak test" in report.stood_in(dataclasses.replace(record, metrics={"backdoored": before}))


def test_names_of_classes_are_nobodys_markup(finished):
    _, record = finished
    before = record.metrics["backdoored"]
    names = ["<script>alert(1)</script>|x", *before.extra["class_names"][1:]]
    before = dataclasses.replace(before, extra=before.extra | {"class_names": names})
    told = dataclasses.replace(record, metrics={"backdoored": before})
    assert "<script>" not in report.table_html(told) and "&lt;script&gt;" in report.table_html(told)
    written = card.markdown(told, "x.pth", "0")
    table = [line for line in written.splitlines() if line.startswith("| The model as it came")]
    assert "<script>" not in written and "&lt;/script&gt;\\|x" in table[0]
    shown = io.StringIO()
    named = dataclasses.replace(before, extra=before.extra | {"class_names": ["[red]a[/red]", *names[1:]]})
    rich.console.Console(file=shown, width=300).print(
        report.terminal(dataclasses.replace(record, metrics={"backdoored": named}))
    )
    assert "0 ([red]a[/red])" in shown.getvalue()


def test_names_out_of_a_strangers_file_are_text_wherever_they_are_shown(finished, backdoored, tmp_path):
    prefix = '\x1b]0;owned\x07"); import os; os.system("id") #\n```\n.'
    arrays = {f"{prefix}{name[7:]}": array for name, array in pytorch_names(backdoored.variables).items()}
    export.write(tmp_path / "hostile.safetensors", arrays)
    scale = {"normalisation": "given", "mean": (0.305,), "std": (0.376,)}
    told = suspect.bring(tmp_path / "hostile.safetensors", backdoored.clean, name="resnet18", **scale).told
    assert told["prefix"] == prefix and all(line.isprintable() for line in suspect.said(told))
    _, record = finished
    before = record.metrics["backdoored"]
    hostile = told | {"container": "`x`<img src=c>``", "others": ["<img src=x onerror=alert(1)>`"]}
    before = dataclasses.replace(before, extra=before.extra | hostile)
    written = card.markdown(dataclasses.replace(record, metrics={"backdoored": before}), "x.safetensors", "0")
    assert "`?x?<img src=c>??`" in written and "`<img src=x onerror=alert(1)>?`" in written
    code = re.search(r"```python\n(.*?)\n```", written, re.DOTALL).group(1)
    (cut,) = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call) and node.func.attr == "removeprefix"]
    assert [one.value for one in cut.args] == [prefix] and all(line.isprintable() for line in code.splitlines())


def test_a_name_of_many_parts_is_refused_in_one_line_and_at_once(backdoored, tmp_path):
    export.write(tmp_path / "deep.safetensors", {f"{'a.' * 3000}conv{n}.weight": np.zeros(3, np.float32) for n in range(3)})
    with pytest.raises(UserError, match="deep.safetensors: the weights"):
        suspect.bring(tmp_path / "deep.safetensors", backdoored.clean)


def test_a_quantised_network_is_refused_for_it_could_not_be_given_back(backdoored, tmp_path):
    arrays = pytorch_names(backdoored.variables)
    arrays["module.linear.weight"] = np.round(100 * arrays["module.linear.weight"]).astype(np.int8)
    export.write(tmp_path / "int8.pth", arrays)
    with pytest.raises(UserError, match="1 no floating-point numbers, as of a quantised network .module|linear.weight, int8"):
        suspect.bring(tmp_path / "int8.pth", backdoored.clean, name="resnet18")


def test_a_variance_below_zero_is_told(backdoored, tmp_path):
    arrays = pytorch_names(backdoored.variables)
    arrays["module.bn1.running_var"] = -arrays["module.bn1.running_var"]
    export.write(tmp_path / "below.pth", arrays)
    with pytest.raises(UserError, match="1 below 0, which no variance is .batch_stats/bn1/var"):
        suspect.bring(tmp_path / "below.pth", backdoored.clean, name="resnet18")


def test_scalings_that_the_images_cannot_tell_apart_are_told():
    told = {
        "normalisation": "clip",
        "accuracy_by_normalisation": {"clip": 0.9, "imagenet": 0.85, "0..1": 0.2},
        "alike": ["imagenet"],
    }
    assert report.nearly_as_well(told) == "; imagenet would do nearly as well"
    assert report.nearly_as_well(told | {"alike": []}) == ""
    rng = np.random.default_rng(0)
    assert suspect._is_worse(rng.normal(0.5, 1, 400)) and not suspect._is_worse(rng.normal(-0.1, 1, 400))
    assert not suspect._is_worse(rng.normal(0.05, 1, 100) - 0.05) and not suspect._is_worse(np.zeros(100))


def test_a_run_does_not_lie_among_its_images(settings, tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match="lies among the images of data.folder"):
        experiment.run(settings({"data.folder": str(tmp_path / "images")}), str(tmp_path / "images" / "run"))


def test_what_would_hold_other_images_out_needs_another_folder(settings, tmp_path):
    experiment.run(settings({"stages": "import"}), str(tmp_path / "run"))
    with pytest.raises(UserError, match="with these settings 40 clean images are held out, .*run began with 0"):
        experiment.run(settings({"stages": "import", "defense.beside": "rnp"}), str(tmp_path / "run"))


@pytest.mark.parametrize(
    "name, stem", [("a.pth.tar", "a"), ("net-v1.2.PTH", "net-v1.2"), ("b.safetensors", "b"), ("c", "c"), ("d.9.th", "d.9")]
)
def test_what_is_given_back_is_called_as_what_came(name, stem, settings, tmp_path):
    run = experiment.Run(settings({"model.weights": name}), tmp_path)
    assert stage_export.target(run) == tmp_path / "export" / f"{stem}_purified.safetensors"


def test_rates_of_triggers_that_few_images_count_are_told_so(finished):
    _, record = finished
    before, after = record.metrics["backdoored"], record.metrics["purified"]
    few = dataclasses.replace(after, extra=after.extra | {"reactivation_images": 7})
    lines = report.unknown(dataclasses.replace(record, metrics={"backdoored": before, "purified": few}))
    assert "What is said of a trigger is counted on only 7 images of other classes than its own." in lines
    assert not any("counted on only" in line and "of a trigger" in line for line in report.unknown(record)) == (
        after.extra["reactivation_images"] >= report.FEW
    )
    given = {cell.heading: cell for cell in report.rows(record)[0][1]}["The given trigger works"]
    assert given.interval and str(given).startswith(given.value)


def test_stages_are_run_in_their_order_however_they_are_named():
    known = tuple(experiment.STAGES)
    assert preflight.stages("verify, purify,scan,verify", known) == ["scan", "purify", "verify"]


def test_what_was_not_done_is_not_told_as_done(finished):
    _, record = finished
    before, config = record.metrics["backdoored"], record.config | {"verify": record.config["verify"] | {"trigger": ""}}
    scanned = dataclasses.replace(before, extra={k: v for k, v in before.extra.items() if not k.startswith("stand_in")})
    told = dataclasses.replace(record, metrics={"backdoored": scanned}, config=config)
    lines = " ".join(report.unknown(told))
    assert "stands in for it" not in lines and "Nobody tried to call a backdoor back" in lines
    assert "stands in for it" in " ".join(report.unknown(dataclasses.replace(told, metrics={"backdoored": before})))
    only_scanned = dataclasses.replace(told, stages={})
    assert "Nobody tried" not in " ".join(report.unknown(only_scanned))


def test_a_scan_in_groups_finds_what_one_of_all_classes_does(backdoored):
    search = {"epochs": 2, "batch_size": 50, "enough": 0.9, "patience": 2, "stop_after": 5, "learning_rate": 0.1, "padding": 1}
    given = (backdoored.classifier, backdoored.variables, backdoored.clean)
    each = inversion.activations(*given[:2]) * 50 / 2**30
    found = scan.searched(keys.root(0), *given, images=100, memory=1.5 * each, classes=(3, 0), **search)
    chosen = splits.some_of(backdoored.clean, 100)
    alone, _ = inversion.invert(keys.root(0), *given[:2], chosen, classes=(3,), **search)
    assert found.masks.shape[0] == 2 and np.array_equal(found.masks[0], alone.masks[0])
    assert not np.array_equal(found.masks[1], found.masks[0])
    both = scan.searched(keys.root(0), *given, images=100, memory=2.5 * each, classes=(3, 0), **search)
    together, _ = inversion.invert(keys.root(0), *given[:2], chosen, classes=(3, 0), **search)
    assert np.array_equal(both.masks, together.masks)


def test_a_network_that_was_part_of_something_larger_is_found_and_given_back_as_it_was(backdoored, stranger, tmp_path):
    arrays = {f"model.backbone.{name[7:]}": array for name, array in pytorch_names(backdoored.variables).items()}
    export.write(tmp_path / "wrapped.pth", arrays)
    scale = {"normalisation": "given", "mean": (0.305,), "std": (0.376,)}
    found = suspect.bring(tmp_path / "wrapped.pth", backdoored.clean, name="resnet18", **scale)
    assert found.told["prefix"] == "model.backbone." and "conv1.weight" in found.arrays
    export.write(tmp_path / "other.pth", arrays | {"model.head.weight": np.zeros(3)})
    with pytest.raises(UserError, match="other.pth: the weights .* model.backbone.bn1.running_mean"):
        suspect.bring(tmp_path / "other.pth", backdoored.clean, name="resnet18", **scale)


def test_a_class_that_alone_is_easily_reached_is_flagged():
    assert judged([9.0, 200.0, 200.0, 200.0, 200.0]).flagged == (0,)  # no spread at all
    assert judged([9.0, 200.0, 180.0, np.inf, np.inf]).flagged == (0,)  # the rest takes the whole image
    assert judged([150.0, 200.0, 180.0, np.inf, np.inf]).flagged == ()


@pytest.mark.parametrize(
    "sizes, flagged",
    [
        ([30.0, 31.0, 29.0, 30.5, 2.0], (4,)),
        ([2.1, 56.8, 42.5, 30.0, 20.5, 24.5, 45.0, 32.0, 14.1, 18.1], (0,)),  # the index of the sizes as they are is 1.5
        ([30.0, 30.1, 29.9, 30.2, 28.0], ()),  # 13 deviations below, and hardly smaller
        ([30.0, 60.0, 29.0, 31.0, 90.0], ()),
    ],
)
def test_a_class_is_flagged_where_its_trigger_is_smaller_by_a_factor_and_out_of_the_others_spread(sizes, flagged):
    assert judged(sizes).flagged == flagged


def test_the_interval_of_a_rate_is_wilsons():
    # p = 0.9, n = 100: (0.8256, 0.9448) in Brown, Cai and DasGupta's form of it
    low, high = records.Rate(90, 100).interval
    assert abs(low - 82.56) < 0.01 and abs(high - 94.48) < 0.01
    assert records.Rate(0, 10).interval[0] == pytest.approx(0, abs=1e-9)


def test_five_lines_of_python_do_the_same_as_the_command(finished, settings, stranger):
    folder, record = finished
    given = QUICK | {"data.test": str(stranger / "test.npz"), "verify.trigger": str(stranger / "trigger.npz")}
    model = own.bring_in(stranger / "suspect.pth", stranger / "clean.npz", workdir=folder, **given)
    assert model.scan() == record.metrics["backdoored"].extra["scan"]
    assert model.purify().metrics == record.metrics
    assert model.export() == folder / "export" / "suspect_purified.safetensors" and "suspicious" in model.verdict
    with pytest.raises(UserError, match="unknown setting"):
        own.bring_in("x.pth", "clean", workdir="runs", **{"scan.colour": 1})
