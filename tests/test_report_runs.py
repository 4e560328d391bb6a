"""The report of many runs: the paper's tables from records alone, pictures, and what cannot be read."""

import csv
import json
import shutil
import statistics

import matplotlib.pyplot as plt
import numpy as np
import pytest

from bibau_jax import records
from bibau_jax.report import __main__ as command
from bibau_jax.report import html, pictures, series, shapes, tables

HITS = {"none": (950, 890), "clean": (960, 10), "ft": (940, 800), "bibau_u": (900, 20), "ibu": (930, 5)}
LAYERS = {"layer1_0/conv1": 0.5, "layer1_0/conv2": 0.25}


def entry(attack="badnets", seed=0, dataset="cifar10", ablation="+A+B", eta=0.5, shift=0):
    """A record of CIFAR-10 with re-activation, as `record.json` holds it."""
    metrics = {}
    for defense, (ca, asr) in HITS.items():
        label = f"{defense}:{ablation}" if defense == "bibau_u" and ablation != "+A+B" else defense
        counts = {"ca": [ca + shift, 1000], "asr": [asr, 900], "robust_accuracy": [900 - asr, 900]}
        row = {"defense": label, "counts": counts, "seconds": 5.0}
        row |= {name: 100 * hits / total for name, (hits, total) in counts.items()}
        if defense != "none":
            row |= {"r_asr": 100 * asr / 900 + shift, "q_asr": 3.0, "r_asr_each": [1.0], "bec_layers": LAYERS, "path": [0, 1]}
            row |= {"path_asr": [2.0, 99.0], "path_asr_recalibrated": [3.0, 99.0], "path_ca": [90.0, 95.0]}
        metrics[{"none": "backdoored", "bibau_u": "purified"}.get(defense, defense)] = row | {
            "bec": 1.0 if defense == "none" else 0.4
        }
    return {
        "config": {
            "data": {"name": dataset, "train_size": 100, "clean_size": 10},
            "model": {"name": "resnet18", "width": 8, "stages": [1]},
            "attack": {"name": attack, "target_label": 0},
            "defense": {"name": "bibau_u", "eta": eta, "ablation": ablation},
        },
        "seed": seed,
        "command": "python -m bibau_jax.main",
        "versions": {"jax": "0.10.1"},
        "device": {"platform": "cpu", "kind": "cpu", "count": 1, "processes": 1, "host_cpu": "A CPU", "host_cores": 2},
        "stages": {},
        "metrics": metrics,
    }


@pytest.fixture
def runs(tmp_path):
    """Two seeds of BadNets, one of Refool, an ablation of each, and the grid's own log beside them."""
    made = {"badnets_0": entry(), "badnets_1": entry(seed=1, shift=10), "refool_0": entry("refool")}
    made |= {"badnets_0_a": entry(ablation="+A"), "refool_0_a": entry("refool", ablation="+A")}
    for name, record in made.items():
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "record.json").write_text(json.dumps(record))
        (tmp_path / "runs" / name / "config.json").write_text("{}")
    return tmp_path / "runs"


def lines_of(out):
    with open(out / "tables.csv") as file:
        return list(csv.DictReader(file))


def test_everything_is_written_and_the_same_records_give_the_same_bytes(runs, tmp_path):
    assert command.main([str(runs), "--out", str(tmp_path / "a")]) == 0
    assert command.main([str(runs), "--out", str(tmp_path / "b")]) == 0
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {"tables.md", "tables.csv", "index.html", "scatter.png", "bec_layers.png", "path.png"}
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_cells_are_means_over_seeds_and_averages_over_attacks(runs, tmp_path):
    command.main([str(runs), "--out", str(tmp_path / "out")])
    told = {(line["table"], line["defense"], line["attack"], line["metric"]): line for line in lines_of(tmp_path / "out")}
    cell = told["2", "ft", "badnets", "r_asr"]
    values = [100 * 800 / 900, 100 * 800 / 900 + 10]
    assert float(cell["mean"]) == pytest.approx(statistics.mean(values), rel=1e-5)
    assert float(cell["std"]) == pytest.approx(statistics.stdev(values), rel=1e-5) and cell["n"] == "2"
    average = told["2", "ft", "average", "r_asr"]
    assert float(average["mean"]) == pytest.approx((statistics.mean(values) + 100 * 800 / 900) / 2, rel=1e-5)
    assert {line["defense"] for line in lines_of(tmp_path / "out") if line["table"] == "6"} == {"none", "bibau_u", "bibau_u:+A"}
    assert not [line for line in lines_of(tmp_path / "out") if line["table"] in "12" and ":" in line["defense"]]


def changed(record, **settings):
    """The record with other settings, "section__name"."""
    for name, value in settings.items():
        section, option = name.split("__")
        record["config"].setdefault(section, {})[option] = value
    return record


def test_means_over_attacks_are_of_runs_with_the_same_settings(runs, tmp_path):
    for name in ("badnets_0_a", "refool_0_a"):
        shutil.rmtree(runs / name)
    for name in ("badnets_0", "badnets_1", "refool_0"):
        path = runs / name / "record.json"
        record = json.loads(path.read_text())
        path.write_text(json.dumps(changed(record, reactivate__epochs=50 if name == "refool_0" else 20)))
    rows = series.rows(command.collect(runs)[0])
    told = {row["record"]: (row["variant"], row["settings"]) for row in rows if row["defense"] == "ft"}
    assert told["badnets_0"] == told["badnets_1"] == (1, "")
    assert told["refool_0"] == (2, "reactivate.epochs 50 instead of 20")
    lines = series.summary([row for row in rows if row["defense"] == "ft"])
    assert set(shapes.cells(lines, "2", "cifar10")["ft"]) == {"badnets"}


def test_an_attacks_own_settings_set_its_runs_apart_and_no_other_attacks():
    made = {"a": entry(), "b": entry(seed=1), "c": changed(entry(seed=2), attack__poison_ratio=0.2), "d": entry("refool")}
    found = {name: records._record(json.loads(json.dumps(record))) for name, record in made.items()}
    told = {row["record"]: (row["variant"], row["settings"]) for row in series.rows(found) if row["defense"] == "ft"}
    assert told["a"] == told["b"] == told["d"] == (1, "")
    assert told["c"] == (2, "attack.poison_ratio 0.2 instead of none")


def test_the_ablation_is_of_the_same_models_in_every_row(runs, tmp_path):
    command.main([str(runs), "--out", str(tmp_path / "out")])
    told = {(line["defense"], line["attack"]): line["n"] for line in lines_of(tmp_path / "out") if line["table"] == "6"}
    assert told["bibau_u", "badnets"] == told["bibau_u:+A", "badnets"] == "1"  # seed 1 has no +A


def test_pictures_show_the_runs_that_tables_show_and_each_model_once(runs, monkeypatch, tmp_path):
    for number, eta in enumerate((0.0, 1.0)):
        made = changed(entry(eta=eta), defense__beside="")
        (runs / f"eta{number}").mkdir()
        (runs / f"eta{number}" / "record.json").write_text(json.dumps(made))
    found = command.collect(runs)[0]
    rows = series.rows(found)
    alike, by_eta = series.shown(found, rows), series.shown(found, rows, changed="defense.eta")
    mine = [name for name, record in alike.items() for m in record.metrics.values() if m.defense == "bibau_u"]
    assert sorted(mine) == ["badnets_0", "badnets_1", "refool_0"]
    assert {name for name, record in by_eta.items() for m in record.metrics.values() if m.defense == "bibau_u"} >= {
        "eta0",
        "eta1",
    }
    drawn = []
    monkeypatch.setattr(plt.Axes, "plot", lambda self, x, y, **how: drawn.append((list(x), list(map(float, y)))))
    pictures.eta_sweep(by_eta, tmp_path / "eta.png")
    assert drawn[0] == ([0.0, 0.5, 1.0], [90.0, 90.0, 90.0])  # seed 1, whose accuracy is higher, has one eta only


def test_the_code_form_of_bec_is_scaled_over_all_records_of_a_backdoored_model():
    first, second = entry(), entry()
    second["metrics"] = {name: second["metrics"][name] for name in ("backdoored", "ft")}
    second["metrics"]["ft"]["defense"] = "nc"
    for record in (first, second):
        record["metrics"]["backdoored"]["model_sha256"] = "b"
    similar = {"clean": 0.2, "ft": 0.8, "purified": 0.4, "ibu": 0.3}
    for name, value in similar.items():
        first["metrics"][name]["bec_similarity"] = {"one": value}
    second["metrics"]["ft"]["bec_similarity"] = {"one": 1.0}
    found = {name: records._record(json.loads(json.dumps(r))) for name, r in (("x", first), ("y", second))}
    told = {row["defense"]: row.get("bec_code") for row in series.rows(found)}
    assert told["nc"] == 1.0 and told["ft"] == pytest.approx(0.75) and told["bibau_u"] == pytest.approx(0.25)


def test_the_papers_value_stands_beside_ours_where_it_has_one(runs, tmp_path):
    command.main([str(runs), "--out", str(tmp_path / "out")])
    told = {
        (line["table"], line["defense"], line["attack"], line["metric"]): line["paper"] for line in lines_of(tmp_path / "out")
    }
    assert told["1", "none", "badnets", "ca"] == "90" and told["2", "bibau_u", "badnets", "r_asr"] == "3.6"
    assert told["2", "ft", "badnets", "ca"] == told["2", "clean", "badnets", "ca"] == ""
    assert told["2", "bibau_u", "average", "r_asr"] == ""  # the paper's is over all ten attacks, ours over two
    assert "(90.0)" in (tmp_path / "out" / "tables.md").read_text()


def test_the_papers_tables_average_to_what_it_prints():
    """Facts are carried over right: averages of table 2 agree with its rows to the printed digit."""
    rows = shapes.paper()["2"]["rows"]
    checked = 0
    for defense in {row["defense"] for row in rows}:
        for metric in ("ca", "asr", "r_asr", "q_asr"):
            values = [row.get(metric) for row in rows if row["defense"] == defense and row["attack"] != "average"]
            printed = next(row.get(metric) for row in rows if row["defense"] == defense and row["attack"] == "average")
            if None not in values and printed is not None:
                checked += 1
                assert np.mean(values) == pytest.approx(printed, abs=0.06), (defense, metric)
    assert checked > 25


def test_another_network_or_data_set_is_not_compared_with_a_table_of_the_paper_that_it_is_not_in():
    assert shapes.papers_value("2", "digits", "bibau_u", "badnets", "ca") is None
    assert shapes.papers_value("2", "tiny_imagenet", "bibau_u", "badnets", "ca") is not None


def test_a_damaged_record_is_named_left_out_and_ends_in_an_error(runs, tmp_path, capsys):
    (runs / "badnets_1" / "record.json").write_text("{")
    assert command.main([str(runs), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "badnets_1/record.json is not a record" in said
    assert {line["n"] for line in lines_of(tmp_path / "out") if line["attack"] == "badnets"} == {"1"}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"bec_layers": "x"}, "metrics.purified.bec_layers is 'x', which is not of the right type"),
        ({"r_asr": [1.0]}, "metrics.purified.r_asr is"),
        ({"r_asr_each": [1.0, "2"]}, "metrics.purified.r_asr_each is"),
        ({"r_asr": float("nan")}, "metrics.purified.r_asr is 'nan'"),
        (None, "holds no measurement yet"),
    ],
)
def test_a_record_whose_numbers_are_none_is_named_and_left_out(change, words, runs, tmp_path, capsys):
    path = runs / "refool_0" / "record.json"
    record = json.loads(path.read_text())
    record["metrics"] = {} if change is None else record["metrics"]
    record["metrics"].get("purified", {}).update(change or {})
    path.write_text(json.dumps(record))
    for work in (command.main, tables.main):
        assert work([str(runs), "--out", str(tmp_path / "out")]) == 1
        said = capsys.readouterr().err
        assert words in said and str(path) in said


def test_a_folder_without_records_is_one_line(tmp_path, capsys):
    for place in (tmp_path, tmp_path / "missing"):
        assert command.main([str(place), "--out", str(tmp_path / "out")]) == 1
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_etas_are_drawn_where_there_are_two(tmp_path):
    from bibau_jax import records

    found = {}
    for name, eta in (("a", 0.1), ("b", 0.9)):
        (tmp_path / f"{name}.json").write_text(json.dumps(entry(eta=eta)))
        found[name] = records.read(tmp_path / f"{name}.json")
        assert (pictures.eta_sweep(found, tmp_path / "eta.png") is not None) == (name == "b")
    assert (tmp_path / "eta.png").stat().st_size > 5000


def test_features_before_and_after_are_drawn(runs, tmp_path):
    from bibau_jax import records

    rng = np.random.default_rng(0)
    for row in ("none", "bibau_u"):
        (runs / "badnets_0" / "reactivate" / row).mkdir(parents=True)
        parts = {kind: rng.normal(place, 1, (20, 6)).astype(np.float32) for place, kind in enumerate(pictures.KINDS)}
        np.savez(runs / "badnets_0" / "reactivate" / row / "features.npz", labels=np.zeros(20), **parts)
    record = records.read(runs / "badnets_0" / "record.json")
    assert pictures.embeddings(runs / "badnets_0", record, tmp_path / "f.png").stat().st_size > 5000
    assert pictures.embeddings(runs / "refool_0", record, tmp_path / "g.png") is None


def test_a_runs_page_says_whether_the_backdoor_is_gone(runs):
    from bibau_jax import records

    page = html.page(records.read(runs / "badnets_0" / "record.json"))
    assert "Gone or hidden?" in page and "R-ASR" in page and "BEC by layer" in page and "no defence" in page
    plain = entry()
    for row in plain["metrics"].values():
        for name in [name for name in row if name[:2] in ("r_", "q_", "be", "pa")]:
            del row[name]
    (runs / "badnets_0" / "record.json").write_text(json.dumps(plain))
    assert "Gone or hidden?" not in html.page(records.read(runs / "badnets_0" / "record.json"))


def test_ideal_unlearning_is_marked_in_every_table(runs, tmp_path):
    command.main([str(runs), "--out", str(tmp_path / "out")])
    for name in ("tables.md", "index.html"):
        text = (tmp_path / "out" / name).read_text()
        assert "IBU (ideal, no defence)" in text and "IBU is no defence" in text
    found, _ = command.collect(runs)
    assert "IBU is no defence" in tables.markdown(found)
