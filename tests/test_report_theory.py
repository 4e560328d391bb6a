"""Pictures and tables of the theory's studies, from records with known numbers."""

import json

import pytest

from bibau_jax import records
from bibau_jax.errors import UserError
from bibau_jax.report import theory, unlearning
from bibau_jax.theory import three_tasks


def png(path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def run_of(seed: int, **ends) -> dict:
    """What `theory.measure` tells of a run, with angles at the end by defence, (to the backdoor, to the clean task)."""
    overlaps = {kind: {"energy": 0.5, "frobenius": 0.1} for kind in ("triggered", "same_triggered", "ceiling", "floor")}
    drifts = {"share": 0.25, "compensation": 0.5, "cosine": 0.9, "linear_gap": 2.0, "implanted": 4.0, "left": 1.0, "moved": 3.0}
    drifts["by_statistics"], drifts["layers"] = 0.4, {"conv1": {"share": 0.5}, "conv2": {"share": 0.7}, "conv3": {"share": 0.9}}
    shares = dict.fromkeys(("fooled", "target", "kept", "both"), 0.5)
    found = {"attack": "badnets", "seed": seed, "orthogonality": 60.0, "orthogonality_signed": 90.0, "defenses": {}}
    found |= {"settings": {"tangents": 24}, "directions": {"implanted_to_backdoor": 88.0 + seed}}
    found["tangent_overlap"] = {"none": overlaps, "clean": overlaps}
    for row, (backdoor, clean) in ends.items():
        way = {"step": [1, 2], "whole_to_backdoor": [95.0, backdoor], "whole_to_clean": [80.0, clean]}
        found["defenses"][row] = {"ca": 70.0, "asr": 5.0, "trajectory": way | {"whole_to_implanted": [95.0, 99.0]}}
        found["defenses"][row]["angles_by_module"] = {"conv1": {"to_backdoor": 91.0}, "head": {"to_backdoor": 120.0}}
        found["defenses"][row]["completeness"] = {"clean": drifts | {"implanted": 2.0}, "triggered": drifts}
        if row == "bibau_u":
            found["defenses"][row]["adversarial"] = {"start": shares, "end": shares}
    return found


@pytest.fixture
def runs():
    return [run_of(0, ft=(100.0, 60.0), bibau_u=(130.0, 80.0)), run_of(1, ft=(110.0, 88.0), bibau_u=(140.0, 70.0))]


def test_every_kind_of_study_is_drawn_beside_its_record(tmp_path, capsys):
    records.write_study(tmp_path / "three_tasks.json", "three_tasks", "", {}, three_tasks.study())
    drifts = {"clean": [1.0, 2.0], "triggered": [0.5, 2.0], "unseen_clean": [1.0, 1.1], "unseen_triggered": [0.5, 0.6]}
    task = {"gap_seen": 0.1, "gap_unseen": 0.2, "drift": drifts}
    networks = [
        {"width": width, "seed": 0, "tasks": dict.fromkeys(("clean", "backdoor", "unlearning"), task)} for width in (4, 8)
    ]
    records.write_study(tmp_path / "widths.json", "widths", "", {}, {"runs": networks})
    entries = [{"epoch": epoch, "task": "clean" if epoch > 1 else "backdoor", "ca": 50.0, "asr": 60.0} for epoch in (1, 2, 3)]
    records.write_study(tmp_path / "stream.json", "task_stream", "", {}, dict.fromkeys(theory.STREAMS, entries))
    assert theory.main([str(tmp_path)]) == 0
    drawn = capsys.readouterr().out.split()
    told = (tmp_path / "widths.md").read_text()
    for task, forgotten in (("clean", "–"), ("backdoor", "0.50"), ("unlearning", "0.25")):
        assert f"| 4 | {task} | 0.100 | 0.200 | 0.91 | 0.83 | {forgotten} |\n" in told
    assert "| Clean task, then backdoor task | clean | 2 | 50.0 | 60.0 |" in (tmp_path / "stream.md").read_text()
    assert len(drawn) == 3 and all(png(tmp_path / name) for name in ("three_tasks.png", "widths.png", "stream.png"))


def test_a_folder_without_studies_is_told_in_one_line(tmp_path, capsys):
    assert theory.main([str(tmp_path)]) == 1
    assert "holds no record of a study" in capsys.readouterr().err
    assert unlearning.main([str(tmp_path), f"--out={tmp_path}"]) == 1
    assert "holds no record of theory.measure" in capsys.readouterr().err


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(UserError, match="a.json is not a study's record"):
        records.read_study(tmp_path / "a.json")
    (tmp_path / "a.json").write_text(json.dumps({"kind": "widths"}))
    with pytest.raises(UserError, match="a.json is not a study's record"):
        records.read_study(tmp_path / "a.json")


def test_tables_have_a_line_for_every_attack_and_defence(runs):
    told = unlearning.tables(runs)
    assert "| BadNets | Fine-tuning | 70.0 ± 0.0 | 5.0 ± 0.0 | 105.0 ± 7.1 | 74.0 ± 19.8 |" in told
    drifts = "0.25 ± 0.00 | 0.50 ± 0.00 | 0.90 ± 0.00 | 2.00 ± 0.00 | 0.40 ± 0.00 | 0.75 ± 0.00 | 0.25 ± 0.00 | 0.50 ± 0.00"
    assert f"| BadNets | BI-BAU (U) | {drifts} | 2 |" in told
    assert told.count("| Fine-tuning") == 4 and told.count("| BI-BAU (U)") == 5  # fine-tuning makes no adversarial images
    assert "| BadNets | 90.0 ± 0.0 | 60.0 ± 0.0 | 88.5 ± 0.7 | 50.0" in told and "| 0.10 (0.10, 0.10) | 24 | 2 |" in told
    assert "| BadNets | Fine-tuning | 91.0 ± 0.0 | 120.0 ± 0.0 | 2 |" in told
    assert "| BadNets | Fine-tuning | 0.50 ± 0.00 | 0.70 ± 0.00 | 0.90 ± 0.00 | 0.50" in told


def test_gaps_of_older_records_which_counted_statistics_are_left_out(runs):
    for run in runs:
        for told in run["defenses"].values():
            told["completeness"]["triggered"] = dict(told["completeness"]["triggered"])
            del told["completeness"]["triggered"]["by_statistics"]
    assert "0.90 ± 0.00 | – | – | 0.75 ± 0.00" in unlearning.tables(runs)


@pytest.mark.parametrize("command", [theory.main, lambda given: unlearning.main([*given, f"--out={given[0]}"])])
def test_a_record_without_what_is_drawn_is_told_in_one_line(command, runs, tmp_path, capsys):
    records.write_study(tmp_path / "widths.json", "widths", "", {}, {})
    run = {name: value for name, value in runs[0].items() if name != "defenses"}
    records.write_study(tmp_path / "badnets_0.json", "unlearning", "", {}, run)
    assert command([str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"a record in {tmp_path} is damaged: it has no '" in told


def test_the_verdict_counts_who_is_closer_to_what_is_asked(runs):
    told = unlearning.verdict(runs)
    assert "BI-BAU (U) ends nearer than Fine-tuning in 2 of 2 runs. So far off end the one and the other: BadNets 45.0 " in told
    assert "BadNets 45.0 ± 7.1° and 75.0 ± 7.1°." in told and "BadNets 15.0 ± 7.1° and 16.0 ± 19.8°." in told
    assert "Fine-tuning ends nearer than BI-BAU (U) in 0 of 2 runs." in unlearning.verdict(runs, "ft", "bibau_u")
    other = run_of(0, ft=(100.0, 90.0), bibau_u=(90.0, 90.0)) | {"attack": "sig"}
    told = unlearning.verdict([*runs, other])
    assert "in 2 of 3 runs" in told and "75.0 ± 7.1°; SIG 90.0° and 80.0°." in told
    assert unlearning.verdict(runs, other="base_at") == "No run has both BI-BAU (U) and Base AT."


def test_a_defence_that_changed_nothing_has_a_line_without_what_it_has_not(runs):
    for run in runs:
        drifts = run["defenses"]["ft"]["completeness"]["triggered"] | {"linear_gap": None, "by_statistics": None, "layers": {}}
        run["defenses"]["ft"]["completeness"] = {"clean": drifts | {"implanted": 2.0}, "triggered": drifts}
    told = unlearning.tables(runs)
    assert "| BadNets | Fine-tuning | 0.25 ± 0.00 | 0.50 ± 0.00 | 0.90 ± 0.00 | – | – | 0.75" in told
    assert "| BadNets | Fine-tuning | – | – | – | – | – | – | 2 |" in told


def test_the_command_writes_tables_and_a_picture(runs, tmp_path):
    for run in runs:
        records.write_study(tmp_path / "runs" / f"badnets_{run['seed']}.json", "unlearning", "", run["settings"], run)
    assert unlearning.main([str(tmp_path / "runs"), f"--out={tmp_path}"]) == 0
    records.write_study(tmp_path / "runs" / "widths.json", "widths", "", {}, {"runs": []})  # of another kind, left aside
    assert unlearning.main([str(tmp_path / "runs"), f"--out={tmp_path}"]) == 0
    assert png(tmp_path / "unlearning.png") and "Proposition 4.2" in (tmp_path / "unlearning.md").read_text()
