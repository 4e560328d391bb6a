"""The command: whatever is wrong ends in one line on stderr, and nothing is created or lost by it."""

import errno
import os
import pathlib
import shutil
import signal
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from ml_collections import ConfigDict

from bibau_jax import attacks, checkpoint, cli, data, defenses, experiment, main, models, records, train
from bibau_jax.errors import NotApplicable


def tree(folder: pathlib.Path) -> dict:
    """Every file below a folder with its bytes, and every folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def one_line(text: str) -> str:
    """The error among what was said; there must be one, it must be a line, and the last."""
    lines = text.strip().splitlines()
    assert "Traceback" not in text and [line for line in lines if line.startswith("bibau_jax:")] == lines[-1:], text
    return lines[-1]


@pytest.fixture
def started(monkeypatch, capsys, tiny_config):
    """Runs `main` in this process with a config; returns the exit status and the error."""
    handler = signal.getsignal(signal.SIGTERM)

    def run(workdir, changes=None, **top):
        monkeypatch.setattr(main, "CONFIG", SimpleNamespace(value=ConfigDict(tiny_config(changes, **top))))
        monkeypatch.setattr(main, "WORKDIR", SimpleNamespace(value=str(workdir)))
        monkeypatch.setattr(sys, "argv", ["main.py", "--workdir=x"])
        with pytest.raises(SystemExit) as ended:
            main.main([])
        return ended.value.code, one_line(capsys.readouterr().err)

    yield run
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def finished(tiny_config, tmp_path_factory):
    """A run of fine-tuning, done to the end."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    experiment.run(tiny_config({"defense.name": "ft"}), str(folder))
    return folder


@pytest.fixture
def done(finished, tmp_path):
    """The same, to be damaged."""
    return pathlib.Path(shutil.copytree(finished, tmp_path / "run"))


# --- wrong settings, found before anything is made


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"attack.name": "bagnets"}, f'unknown attack "bagnets"; known: {", ".join(attacks.names())}'),
        ({"defense.name": "ibauu"}, f'unknown defence "ibauu"; known: {", ".join(defenses.names())}'),
        ({"defense.beside": "ft,fq"}, 'unknown defence "fq"; known: '),
        ({"data.name": "flip"}, 'unknown data set "flip"'),
        ({"data.name": "cifar11"}, f'unknown data set "cifar11"; known: {", ".join(data.names())}'),
        ({"model.name": "resnet19"}, f'unknown model "resnet19"; known: {", ".join(models.names())}'),
        (
            {"stages": "implant,purge"},
            'unknown stage "purge"; known: import, implant, scan, purify, evaluate, reactivate, verify, export, report',
        ),
        ({"attack.target_label": 10}, "target label 10 is outside the 10 classes 0..9"),
        ({"attack.mode": "one_to_one"}, 'attack mode "one_to_one" is unknown; choose one of all_to_one, all_to_all'),
        ({"attack.poison_ratio": -0.1}, "poison ratio -0.1 is outside (0, 1]"),
        ({"attack.name": "sig", "attack.sig.frequency": 8.0}, "the trigger of sig changes no pixel of the first images"),
        ({"attack.name": "issba", "attack.issba.epochs": 1}, "issba: 2 steps are too few: the image counts fully "),
        ({"attack.name": "narcissus", "attack.narcissus.stages": ()}, "Narcissus needs a surrogate with width and stages"),
        ({"attack.name": "narcissus", "attack.narcissus.public": "/nowhere"}, "/nowhere must hold one subfolder of pictures"),
        ({"attack.poison_ratio": 1.5}, "poison ratio 1.5 is outside (0, 1]"),
        ({"attack.badnets.size": 40}, "a patch of 40 pixels does not fit into images of 16x16"),
        ({"attack.badnets.variant": "disc"}, 'BadNets variant "disc" is unknown; choose one of square, grid'),
        ({"data.clean_size": 500}, "clean set larger than the data: clean_size 500, training images 200"),
        ({"data.train_size": 1290}, "training and validation set larger than the data: train_size 1290"),
        ({"data.padding": -1}, "checkpoint_every must be at least 1, data.padding at least 0"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1, data.padding at least 0"),
        ({"model.stages": ("x",)}, "model.stages takes whole numbers, not ('x',)"),
        ({"model.mean": (0.3, 0.3, 0.3)}, "model.mean and model.std need 1 values, one a channel of digits"),
        (
            {"model.name": "vgg19_bn", "model.stages": (1,) * 5},
            "a VGG of 5 stages halves images as often: 16x16 pixels are too ",
        ),
        ({"model.patch": 4}, "model.patch is no setting of resnet18; it has width, stages, mean, std, dtype"),
        ({"model.file": "my_net.py"}, "model.file=my_net.py: there is no such file"),
        ({"model.width": 0}, "model.width and every entry of model.stages must be at least 1"),
        ({"implant.epochs": 0}, "implant.epochs and implant.batch_size must be at least 1"),
        ({"defense.learning_rate": 0.0}, "defense.learning_rate must be positive"),
        ({"defense.learning_rate": float("nan")}, "defense.learning_rate is nan; it must be a finite number"),
        ({"seed": 10**20}, "seed 100000000000000000000 is outside 0..2147483647"),
        ({"implant.momentum": 1.0}, "implant.momentum must lie in 0..1 (below 1)"),
        ({"defense.ablation": "+C"}, 'ablation "+C" is unknown; choose one of base_at, +A, +B, +A+B'),
        ({"defense.iewc_form": "tanh"}, 'iewc_form "tanh" is unknown; choose one of '),
        ({"defense.pgd.norm": "l0"}, 'pgd.norm "l0" is unknown; choose one of l2, linf, l1'),
        ({"defense.pgd.epsilon": 0.0}, "pgd.epsilon and pgd.step_size must be positive, pgd.steps at least 0"),
        ({"defense.eta": 1.5}, "eta, alpha and softened must lie within 0..1"),
        ({"defense.temperature": 0.0}, "iewc_cap and temperature must be positive"),
        ({"defense.lambda_kd": -1.0}, "lambda_kd must not be negative"),
        ({"defense.fisher_chunk": 0}, "fisher_chunk must be at least 1"),
        ({"defense.beside": "bibau_t", "defense.target_label": 10}, "target label 10 is outside the 10 classes 0..9"),
        ({"implant.schedule": "linear"}, 'learning rate schedule "linear" is unknown; choose one of cosine'),
        ({"compute": "float16"}, 'compute type "float16" is unknown; choose auto, float32 or bfloat16'),
    ],
)
def test_a_wrong_setting_is_named_before_anything_is_made(started, tmp_path, changes, words):
    status, line = started(tmp_path / "run", changes)
    assert status == 2 and line.startswith(f"bibau_jax: {words}")
    assert tree(tmp_path) == {}


def test_without_cifar10_and_without_a_download_it_says_where_to_put_the_archive(started, tmp_path):
    places = {"data.name": "cifar10", "data.data_dir": str(tmp_path / "data"), "data.manual_dir": str(tmp_path / "mine")}
    status, line = started(tmp_path / "run", places | {"data.download": False})
    assert status == 2 and "cifar-10-binary.tar.gz" in line and str(tmp_path / "mine") in line
    assert tree(tmp_path) == {}


def test_a_folder_below_a_file_cannot_be_made(started, tmp_path):
    (tmp_path / "file").write_text("mine")
    status, line = started(tmp_path / "file" / "run")
    assert status == 2 and line == f"bibau_jax: cannot make {tmp_path / 'file' / 'run'}: Not a directory"
    status, line = started(tmp_path / "file")
    assert status == 2 and "file exists and is not a run of this program; choose another --workdir" in line
    assert tree(tmp_path) == {tmp_path / "file": b"mine"}


# --- what is on the disk


def test_the_folder_of_another_config_is_left_alone(started, done, tmp_path):
    before = tree(tmp_path)
    status, line = started(done, {"defense.name": "ft", "implant.epochs": 7})
    assert status == 2 and "holds a run of another config (implant.epochs: 1 -> 7); choose another --workdir" in line
    assert tree(tmp_path) == before


def test_a_model_that_was_cut_short_is_named_and_nothing_else_is_lost(started, done, tmp_path):
    largest = max((done / "implant" / "model").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    os.truncate(largest, largest.stat().st_size // 2)
    shutil.rmtree(done / "purify")
    before = tree(tmp_path)
    status, line = started(done, {"defense.name": "ft"})
    assert status == 2 and f"{done}/implant/model is damaged: " in line and "was cut short or altered" in line
    assert tree(tmp_path) == before


def test_a_checkpoint_that_was_cut_short_is_named_with_the_way_out(started, tmp_path, monkeypatch):
    real = checkpoint.Keeper.save

    def save(keeper, step, *rest):
        real(keeper, step, *rest)
        if step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.Keeper, "save", save)
    status, line = started(tmp_path / "run", stages="implant")
    assert status == 2 and line == "bibau_jax: interrupted; the same command goes on from the last checkpoint"
    monkeypatch.setattr(checkpoint.Keeper, "save", real)
    files = [path for path in (tmp_path / "run/implant/checkpoints/4").rglob("*") if path.is_file()]
    os.truncate(max(files, key=lambda path: path.stat().st_size), 10)
    before = tree(tmp_path)
    status, line = started(tmp_path / "run", stages="implant")
    assert status == 2 and "implant/checkpoints/4 is damaged" in line
    assert line.endswith("(remove this checkpoint to go on from step 2)")
    assert tree(tmp_path) == before
    shutil.rmtree(tmp_path / "run/implant/checkpoints/4")
    assert np.isfinite(experiment.run(main.CONFIG.value.to_dict(), str(tmp_path / "run")).stages["implant"].seconds)


def test_a_fault_of_the_program_is_no_finding_of_a_scan(monkeypatch, tiny_config, tmp_path, capsys):
    def faulty(*_):
        raise ZeroDivisionError("of the program's own")

    monkeypatch.setattr(main, "CONFIG", SimpleNamespace(value=ConfigDict(tiny_config())))
    monkeypatch.setattr(main, "WORKDIR", SimpleNamespace(value=str(tmp_path / "run")))
    monkeypatch.setattr(sys, "argv", ["main.py", "--workdir=x"])
    monkeypatch.setattr(experiment, "run", faulty)
    with pytest.raises(SystemExit) as ended:
        main.main([])
    assert ended.value.code == 2 and "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize("number, words", [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "the quota is used up")])
@pytest.mark.parametrize("writer", ["savez_compressed", "page"])
def test_a_disk_that_takes_no_more_is_one_line_and_what_was_finished_is_kept(started, done, monkeypatch, writer, number, words):
    def full(*arguments, **options):
        raise OSError(number, os.strerror(number), str(done / "strip.npz"))

    place = np if writer == "savez_compressed" else experiment.html
    monkeypatch.setattr(place, writer, full)
    (done / "strip.npz").unlink()
    if writer == "page":
        monkeypatch.setitem(experiment.STAGES, "evaluate", lambda *arguments: None)
    kept = {path: file for path, file in tree(done).items() if path.parent != done}
    status, line = started(done, {"defense.name": "ft"}, stages="evaluate,report")
    assert status == 2 and line == f"bibau_jax: cannot write {done / 'strip.npz'}: {words}; what was finished is kept"
    assert {path: file for path, file in tree(done).items() if path.parent != done} == kept
    assert records.read(done / "record.json").metrics.keys() == {"backdoored", "purified"}


def test_a_full_disk_during_a_save_is_one_line_too(started, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "_write_manifest", full)
    status, line = started(tmp_path / "run", stages="implant")
    assert status == 2 and line.startswith(f"bibau_jax: cannot write {tmp_path}/run/implant/checkpoints/2: ")
    assert line.endswith("No space left on device")
    assert list((tmp_path / "run/implant/checkpoints").iterdir()) == []  # no half of a checkpoint is left


def test_a_loss_that_is_not_finite_names_stage_and_step(started, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "cross_entropy", lambda logits, labels: logits.sum(-1) * np.nan)
    status, line = started(tmp_path / "run", stages="implant")
    assert status == 2 and line.startswith("bibau_jax: implant: the loss is nan at step 1; nothing was saved yet;")


def test_a_defence_that_cannot_treat_the_network_ends_in_a_status_of_its_own(started, tmp_path, monkeypatch):
    def refuse(classifier):
        raise NotApplicable("this network has no norms")

    monkeypatch.setattr(defenses.get("anp"), "check_network", refuse)
    status, line = started(tmp_path / "run", {"defense.name": "anp"})
    assert status == 3 and line == "bibau_jax: not applicable: this network has no norms"
    assert not (tmp_path / "run").exists()


# --- the command line itself, in processes of their own


def ended(process) -> str:
    """The one line in which a process of the command ended."""
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 2, stdout + stderr
    return one_line(stderr)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--config.defence.epochs=3"], """unknown setting 'defence' Did you mean "defense" instead of "defence"?"""),
        (["--config.defense.epoch=3"], """unknown setting 'epoch' Did you mean "epochs" instead of "epoch"?"""),
        (["--config.defense.pdg.steps=3"], "unknown setting 'pdg'"),
        (["--config.pgd.steps=3"], "unknown setting 'pgd' (in --config.pgd.steps); did you mean --config.defense.pgd.steps?"),
        (["--config.softened=0"], "unknown setting 'softened' (in --config.softened); did you mean --config.defense.softened?"),
        (["--config.seed=abc"], "flag --config.seed=abc: invalid literal for int()"),
        (["--config.defense.pgd.steps=2.5"], "flag --config.defense.pgd.steps=2.5: invalid literal for int()"),
        (["--nonsense=1"], "Unknown command line flag 'nonsense'"),
        (["seed=1"], '"seed=1" is not a flag; settings are written --config.name=value'),
        (["--workdir="], "where to? give --workdir, e.g. --workdir=runs/digits"),
    ],
)
def test_a_wrong_flag_is_named_before_jax_is_even_started(program, tmp_path, flags, words):
    line = ended(program(f"--workdir={tmp_path / 'run'}", *flags))
    assert line.startswith(f"bibau_jax: {words}")
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("name", ["defense.target", "epochs"])  # nowhere, and in many sections
def test_no_other_setting_is_proposed_where_none_can_be_meant(program, tmp_path, name):
    line = ended(program(f"--workdir={tmp_path / 'run'}", f"--config.{name}=3"))
    assert line == f"bibau_jax: unknown setting '{name.split('.')[-1]}' (in --config.{name})"


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "which settings? give --config, e.g. --config=configs/digits.py"),
        (["--config=configs/digits.py"], "where to? give --workdir, e.g. --workdir=runs/digits"),
        (["--workdir=RUN"], "which settings? give --config, e.g. --config=configs/digits.py"),
        (["--workdir=RUN", "--config=configs/nope.py"], "Failed loading config file"),
        (["--workdir=RUN", "--config=configs/theory/task_stream.py:nope"], 'bibau_jax: unknown size of the task stream "nope"'),
        (["--workdir=RUN", "--config=pyproject.toml"], "(pyproject.toml, line "),
    ],
)
def test_without_a_folder_or_a_config_file_it_asks_for_one(program, tmp_path, flags, words):
    line = ended(program(*(flag.replace("RUN", str(tmp_path / "run")) for flag in flags), bare=True))
    assert words in line
    assert tree(tmp_path) == {}


def test_a_wrong_setting_ends_the_real_command_in_the_same_line(program, tmp_path):
    line = ended(program(f"--workdir={tmp_path / 'run'}", "--config.attack.name=bagnets"))
    assert line == f'bibau_jax: unknown attack "bagnets"; known: {", ".join(attacks.names())}'
    assert tree(tmp_path) == {}


def test_flags_may_come_in_any_order(program, tmp_path):
    flags = ("--config.seed=1", f"--workdir={tmp_path / 'run'}")
    for config in (["--config=configs/digits.py:bagnets"], ["--config", "configs/digits.py:bagnets"]):
        assert 'unknown attack "bagnets"; known: ' in ended(program(*flags, *config, bare=True))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["implant", "implant/trigger", "purify/bibau_u"])
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_goes_on_to_the_same_model(program, tmp_path, by, stage):
    epochs = {"implant": "implant.epochs", "implant/trigger": "attack.iad.mask_epochs"}.get(stage, "defense.epochs")
    flags = [f"--config.{epochs}=60", "--config.checkpoint_every=7", f"--config.stages={stage.split('/')[0]}"]
    if stage == "implant/trigger":
        flags += ["--config.attack.name=iad", "--config.attack.iad.width=2"]
    if stage == "purify/bibau_u":
        given = program(f"--workdir={tmp_path / 'given'}", "--config.stages=implant")
        assert given.communicate(timeout=300) and given.returncode == 0
        flags.append(f"--config.implant.reuse={tmp_path / 'given'}")
    killed = program(f"--workdir={tmp_path / 'run'}", *flags)
    saved = tmp_path / "run" / stage / "checkpoints"
    deadline = time.monotonic() + 120
    while not any(path.name.isdecimal() and int(path.name) > 20 for path in saved.glob("*")):
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(by)
    _, stderr = killed.communicate(timeout=60)
    assert not (tmp_path / "run" / stage / "model").exists()
    if by == signal.SIGTERM:
        assert killed.returncode == 2 and "interrupted; the same command goes on" in one_line(stderr)
    for folder in ("run", "whole"):
        ending = program(f"--workdir={tmp_path / folder}", *flags)
        assert ending.communicate(timeout=300) and ending.returncode == 0
    trained = "implant" if stage == "implant/trigger" else stage  # the victim, with the trigger in it
    digests = [checkpoint.load(tmp_path / run / trained / "model")[1]["sha256"] for run in ("run", "whole")]
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    "given", [["--config.stages", "import, scan"], ["--config.stages=import, scan"], ["-config.stages=scan"]]
)
def test_the_command_that_is_recorded_names_no_stages(given, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main", "--config=configs/digits.py", *given, "--config.data.folder=my images"])
    told = "python -m bibau_jax.main --config=configs/digits.py '--config.data.folder=my images'"
    assert cli.command_line() == told
