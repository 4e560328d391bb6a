"""The theory measured on a finished run: what is told of it, and that purifications are run again as they were."""

import json
import shutil

import numpy as np
import pytest

from bibau_jax import experiment, records
from bibau_jax.errors import UserError
from bibau_jax.report import unlearning
from bibau_jax.run import Run
from bibau_jax.theory import measure


def test_a_run_of_an_earlier_version_gets_the_settings_that_it_lacks():
    defaults = {"seed": 0, "defense": {"epochs": 20, "eta": 0.5, "pgd": {"norm": "l2"}}, "stream": {"epochs": 1}}
    config = {"seed": 3, "defense": {"epochs": 2, "own": 1, "pgd": {}}}
    expected = {"seed": 3, "defense": {"epochs": 2, "eta": 0.5, "pgd": {"norm": "l2"}, "own": 1}, "stream": {"epochs": 1}}
    assert measure.completed(config, defaults) == expected


def test_a_defence_without_epochs_has_no_states_on_its_way(tiny_config, tmp_path):
    this = Run(tiny_config(), tmp_path)
    with pytest.raises(UserError, match="clp is not trained by epochs of batches"):
        measure.check(this, ["ft", "clp"], tmp_path / "states", images=4, tangents=2)


@pytest.mark.slow
def test_a_finished_run_is_measured_and_only_read(tiny_config, tmp_path):
    changes = {"implant.clean_twin": "train", "implant.epochs": 4, "defense.beside": "ft,ibu", "model.width": 8}
    experiment.run(tiny_config(changes, stages="implant,purify"), tmp_path / "badnets_0")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "badnets_0").rglob("*")}
    given = [str(tmp_path / "badnets_0"), f"--out={tmp_path / 'out'}", f"--states={tmp_path / 'states'}"]
    given += ["--defenses=ft,bibau_u,ibu", "--images=20", "--tangents=6"]
    measure.main(given)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "badnets_0").rglob("*")}
    found = records.read_study(tmp_path / "out" / "badnets_0.json").found
    assert set(found["defenses"]) == {"ft", "bibau_u", "ibu"}
    overlaps = found["tangent_overlap"]["none"]
    assert 0 < overlaps["floor"]["frobenius"] < 1 and 0 < overlaps["triggered"]["frobenius"] < 1
    assert overlaps["same_triggered"]["energy"] > overlaps["floor"]["energy"]
    for row, told in found["defenses"].items():
        assert told["apart_from_run"] < 1e-3  # the same purification, step by step
        assert told["trajectory"]["step"] == [1, 2] and len(told["trajectory"]["whole_to_clean"]) == 2
        assert all(0 <= told["trajectory"][f"whole_{name}"][0] <= 180 for name in ("to_clean", "to_backdoor", "to_implanted"))
        assert list(told["completeness"]["clean"]["layers"]) == ["conv1", "layer1_0/conv1", "layer1_0/conv2"]
        assert ("adversarial" in told) == (row == "bibau_u")
    assert unlearning.tables(unlearning.collect(tmp_path / "out")).count("BI-BAU (U)") >= 3
    shutil.rmtree(tmp_path / "out")
    measure.main(given)  # the states are found again
    again = records.read_study(tmp_path / "out" / "badnets_0.json").found
    assert again["defenses"]["ft"]["trajectory"] == found["defenses"]["ft"]["trajectory"]


def test_a_folder_that_holds_no_run_is_told_in_one_line(tmp_path, capsys):
    for flags, words in (
        ([], "cannot be read as a run's config"),
        (["--defaults=no.py"], "there is no no.py: run this in"),
        (["--defaults=README.md"], "README.md is no config: SyntaxError"),
    ):
        with pytest.raises(SystemExit):
            measure.main([str(tmp_path), f"--out={tmp_path / 'out'}", *flags])
        assert words in capsys.readouterr().err


def test_no_record_takes_the_place_of_another_runs(tmp_path, capsys):
    for number in (0, 1):
        folder = tmp_path / str(number) / "badnets_0"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"seed": number}))
    one, other = (str(tmp_path / str(number) / "badnets_0") for number in (0, 1))
    records.write_study(tmp_path / "out" / "badnets_0.json", "unlearning", "", {}, {"seed": 0})
    (tmp_path / "file").write_text("")
    for given, words in (
        ([one, other, f"--out={tmp_path / 'new'}"], "two runs are called badnets_0"),
        ([other, f"--out={tmp_path / 'out'}"], "badnets_0.json is of another run (seed 0, not 1)"),
        ([one, f"--out={tmp_path / 'file'}"], "is not a folder"),
        ([one, f"--out={tmp_path / 'new'}", f"--states={tmp_path / 'file'}"], "is not a folder"),
    ):
        with pytest.raises(SystemExit):
            measure.main(given)
        assert words in " ".join(capsys.readouterr().err.split())


def test_a_model_that_did_not_move_has_no_share_of_its_movement():
    assert measure._share(np.zeros(3), np.zeros(3)) is None
    assert measure._share(np.array([3.0, 4.0]), np.array([0.0, 10.0])) == 0.5


@pytest.mark.parametrize(
    ("rows", "changes", "words"),
    [
        (["ft"], {"tangents": 0}, "--tangents=0 must be at least 1"),
        (["ft"], {"images": 0}, "--images=0 must be at least 1"),
        (["ft"], {"tangents": 10_000}, "--tangents=10000 needs 40000 test images, there are "),
        (["foo"], {}, 'unknown defence "foo"'),
        (["ft"], {}, "has no model of ft; leave it out of --defenses, or give --states"),
    ],
)
def test_what_cannot_be_measured_is_told_before_it_begins(rows, changes, words, tiny_config, tmp_path):
    with pytest.raises(UserError, match=words):
        measure.check(Run(tiny_config(), tmp_path), rows, None, **({"images": 4, "tangents": 2} | changes))
