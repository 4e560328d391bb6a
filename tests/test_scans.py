"""What scans of known models add up to, from their records."""

import json
import shutil
from importlib import resources
from pathlib import Path

import pytest

from bibau_jax.report import own, scans, tables

ROOT = Path(__file__).parents[1]


def told(number, *, flagged=(), attack="badnets", innocent=False, target=3, index=2.5):
    """The record of a scan, as a run leaves it, as plain data."""
    found = {"anomaly_index": index, "suspected": (flagged or (1,))[0], "flagged": list(flagged)}
    measured = {
        "defense": "none",
        "ca": 99.0,
        "asr": None,
        "robust_accuracy": None,
        "counts": {"ca": [99, 100], "asr": None, "robust_accuracy": None},
        "seconds": 1.0,
        "model_sha256": f"model {number}",
    }
    config = {"seed": number, "data": {"name": "digits"}, "model": {"name": "resnet18", "width": 8, "stages": [1, 1, 1]}}
    config |= {"attack": {"name": attack, "target_label": target}, "implant": {"innocent": innocent}, "scan": {"limit": 2.0}}
    made = {"config": config, "seed": number, "command": "the command", "device": {}, "versions": {}, "stages": {}}
    return made | {"metrics": {"backdoored": measured | {"scan": found}}}


@pytest.fixture
def folder(tmp_path):
    """Records of eight scans: of a clean model twice."""
    made = [
        told(0, flagged=(3,)),
        told(1, flagged=(4, 3)),
        told(2, flagged=(5,)),
        told(3, attack="sig", index=1.0),
        told(4, innocent=True, target=3, flagged=(3,)),
        *(told(number, innocent=True, index=0.5) for number in (5, 6)),
        told(6, innocent=True, index=0.5),
    ]
    (tmp_path / "records").mkdir()
    for number, record in enumerate(made):
        (tmp_path / "records" / f"{number}.json").write_text(json.dumps(record))
    return tmp_path / "records"


def test_scans_are_counted_by_what_they_flagged_and_a_model_once(folder, tmp_path):
    assert scans.main([str(folder), "--out", str(tmp_path / "scan"), "--rates", str(tmp_path / "rates.json")]) == 0
    lines = json.loads((tmp_path / "scan.json").read_text())["summary"]
    ends = {line["attack"]: tuple(line[name] for name in ("models", *scans.ENDS)) for line in lines}
    assert ends == {"clean": (3, 0, 1, 2, 0), "badnets": (3, 2, 1, 0, 0), "sig": (1, 0, 0, 1, 0)}
    assert list(ends) == ["clean", "badnets", "sig"]
    rates = json.loads((tmp_path / "rates.json").read_text())
    assert rates == {
        "clean": {"models": 3, "flagged": 1},
        "backdoored": {"models": 4, "flagged": 2, "attacks": ["badnets", "sig"]},
        "datasets": ["digits"],
    }
    page = (tmp_path / "scan.md").read_text()
    assert "1 of 3 (33 %; 6 to 79 %) of the clean models" in page and (tmp_path / "scan.png").stat().st_size > 5000


def test_the_page_keeps_what_was_written_by_hand_and_is_the_same_again(folder, tmp_path):
    (tmp_path / "scan.md").write_text(f"{tables.OPEN}\n# By hand\n{tables.CLOSE}\nold")
    made = []
    for _ in range(2):
        assert scans.main([str(folder), "--out", str(tmp_path / "scan")]) == 0
        made.append((tmp_path / "scan.md").read_bytes())
    assert made[0] == made[1] and b"# By hand" in made[0] and b"old" not in made[0]


def test_a_folder_without_scans_or_with_a_damaged_record_is_told(folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert scans.main([str(tmp_path / "empty"), "--out", str(tmp_path / "scan")]) == 1
    assert "no verdict of the scan is recorded" in capsys.readouterr().err and not (tmp_path / "scan.md").exists()
    (folder / "torn.json").write_text('{"config": {')
    assert scans.main([str(folder), "--out", str(tmp_path / "scan")]) == 1
    assert "torn.json" in capsys.readouterr().err and (tmp_path / "scan.md").exists()


def test_what_pages_say_of_the_scan_is_what_the_committed_records_hold():
    found, broken = scans.series.collect(ROOT / "results" / "records" / "scan")
    rates = scans.reliability(scans.summary(scans.rows(found)))
    assert not broken and rates["clean"]["models"] > 0
    shipped = json.loads(resources.files("bibau_jax.report").joinpath("scan_rates.json").read_text())
    assert shipped == rates
    said = own.reliability()
    assert f"{rates['clean']['flagged']} of {rates['clean']['models']} clean ones" in said
    assert f"{rates['backdoored']['flagged']} of {rates['backdoored']['models']} with a backdoor (BadNets" in said


def test_the_verdicts_of_neural_cleanse_are_counted_likewise(tmp_path):
    (tmp_path / "records").mkdir()
    for number, flagged in enumerate(([3], [], [1, 3])):
        record = told(number, innocent=number > 0, index=9.0)
        record["config"]["defense"] = {"nc": {"limit": 1.5}}
        verdict = {"defense": "nc", "model_sha256": "another", "flagged": flagged, "anomaly_index": 2.5, "suspected": 3}
        verdict |= {"relative_size": 0.4 if number == 0 else 0.7}
        record["metrics"]["nc"] = {**record["metrics"]["backdoored"], **verdict}
        (tmp_path / "records" / f"{number}.json").write_text(json.dumps(record))
    assert scans.main([str(tmp_path / "records"), "--out", str(tmp_path / "nc"), "--of", "nc"]) == 0
    rows = json.loads((tmp_path / "nc.json").read_text())["rows"]
    assert [(row["attack"], row["end"]) for row in rows] == [("clean", "nothing"), ("clean", "other"), ("badnets", "target")]
    assert {row["limit"] for row in rows} == {1.5} and {row["anomaly_index"] for row in rows} == {2.5}
    page = (tmp_path / "nc.md").read_text()
    assert "## What NC flagged" in page and "(nc.png)" in page and "1 of 2" in page
    assert "(`defense.nc.at_most=0.5`): 0 of 2 (0 %" in page and "of the clean models, 1 of 1 (100 %" in page
    assert page.count(" 0.70 |") == 2


@pytest.mark.parametrize(("name", "of"), [("scan", "scan"), ("nc_alarms", "nc")])
def test_published_results_are_what_their_records_say(name, of, tmp_path):
    results = ROOT / "results"
    shutil.copy(results / f"{name}.md", tmp_path)
    _, broken = scans.write(results / "records" / name, tmp_path / name, of=of)
    assert not broken
    for suffix in (".md", ".json"):
        again = f"python -m bibau_jax.report.scans results/records/{name} --of {of} --out results/{name}"
        assert (tmp_path / f"{name}{suffix}").read_bytes() == (results / f"{name}{suffix}").read_bytes(), again
