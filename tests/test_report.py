"""The report shows the record's numbers and nothing else, in a page and in tables that can be rebuilt byte for byte."""

import io
import json
import re
import shutil
import statistics
import subprocess
import sys
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from bibau_jax import records
from bibau_jax.errors import UserError
from bibau_jax.report import figures, html, progress, series, strip, tables, words

RESULTS = Path(__file__).parents[1] / "results"
SCANS = ("scan", "nc_alarms")  # tests/test_scans.py
PAGES = sorted(
    path.stem for path in RESULTS.glob("*.md") if path.stem not in SCANS and (RESULTS / "records" / path.stem).is_dir()
)
HOSTILE = "<script src='https://evil.example/x.js'>alert(1)</script>\"&"
DEFENSES = {"backdoored": "none", "clean": "clean", "finetuned": "ft", "base_at": "base_at", "purified": "bibau_u"}


def measured(defense, ca, asr, robust, seconds=1.5):
    counts = {"ca": [ca, 500], "asr": [asr, 450], "robust_accuracy": [robust, 450]}
    rates = {name: 100.0 * hits / count for name, (hits, count) in counts.items()}
    return {"defense": defense, **rates, "counts": counts, "seconds": seconds}


def record_dict(seed=0, attack="badnets", name="digits", purified_ca=475, asr=6):
    stage = {"seconds": 61.2, "peak_memory_mb": 812.0, "device_peak_memory_mb": None}
    hits = {"none": (486, 450, 0), "clean": (490, 2, 439), "ft": (485, 442, 7), "base_at": (471, 16, 414)}
    hits["bibau_u"] = (purified_ca, asr, 425)
    return {
        "config": {
            "data": {"name": name, "train_size": 1297, "clean_size": 65},
            "model": {"name": "resnet18", "width": 16, "stages": [1, 1, 1, 1]},
            "attack": {"name": attack, "target_label": 0},
            "defense": {"name": "bibau_u", "iewc_cap": 100.0},
        },
        "seed": seed,
        "command": f"python -m bibau_jax.main --config=configs/digits.py:{attack} --config.defense.iewc_cap=100.0",
        "versions": {"jax": "0.10.1", "numpy": "2.3.1"},
        "device": {"platform": "cpu", "kind": "cpu", "count": 1, "processes": 1, "host_cpu": "A CPU", "host_cores": 2},
        "stages": {name: dict(stage) for name in ("implant", "purify/ft", "purify/bibau_u", "evaluate")},
        "metrics": {key: measured(defense, *hits[defense]) for key, defense in DEFENSES.items()},
    }


def log_lines():
    for epoch in range(6):
        yield {"stage": "implant", "epoch": epoch, "step": 9 * epoch, "loss": 2.0 / (1 + epoch), "accuracy": 0.5}
    for epoch in range(6):
        line = {"stage": "purify/bibau_u", "epoch": epoch, "step": 4 * epoch, "clean_loss": 0.3, "kept": 0.6}
        line |= {"kd": "nan" if epoch == 2 else 0.5, "prior": -0.1 * epoch, "ewc_quadratic": 1e-6 * epoch}
        yield line | {"iewc_quadratic": 1e-4 * epoch**2, "fooled": 0.93, "adversarial_loss": 1.0}


def workdir(folder, record, class_names=tuple("0123456789")):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "record.json").write_text(json.dumps(record))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log_lines()))
    clean = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 1), dtype=np.uint8)
    triggered = clean.copy()
    triggered[:, -3:, -3:] = 255
    adversarial = np.clip(clean.astype(int) + 8, 0, 255).astype(np.uint8)
    says = {"triggered_by_backdoored": np.zeros(4, int), "triggered_by_purified": np.arange(1, 5)}
    images = {"clean": clean, "triggered": triggered, "adversarial": adversarial, "labels": np.arange(1, 5)}
    np.savez(folder / "strip.npz", **images, **says, class_names=np.array(class_names))
    return folder


class Links(HTMLParser):
    """Everything that a browser would fetch for a page, and every element's name."""

    def __init__(self, page):
        super().__init__()
        self.links, self.tags = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "xlink:href")]


@pytest.fixture
def page(tmp_path):
    return html.write(workdir(tmp_path / "run", record_dict())).read_text(encoding="utf-8")


def test_the_page_loads_nothing_from_elsewhere(page):
    seen = Links(page)
    assert seen.links and all(link.startswith("data:image/png;base64,") for link in seen.links)
    assert not {"script", "link", "iframe", "object"} & set(seen.tags)
    assert "://" not in page and "url(" not in page and "@import" not in page


def test_the_page_has_headings_alternative_texts_and_table_heads_with_scope(page):
    assert page.count("<h1>") == 1 and page.count("<h2") >= 6
    assert len(re.findall(r"<img ", page)) == len(re.findall(r'<img [^>]*alt="[^"]+"', page)) == 20
    assert not re.findall(r"<th(?! scope=)[ >]", page)
    assert page.count('role="img"') == len(re.findall(r'<svg class="[^"]+" role="img" [^>]*aria-label="[^"]+"', page))


def test_hostile_texts_in_the_record_and_the_strip_are_escaped(tmp_path):
    hostile = record_dict(attack=HOSTILE, name=HOSTILE)
    hostile["command"] += HOSTILE
    hostile["versions"][HOSTILE] = HOSTILE
    hostile["config"]["model"]["name"] = HOSTILE
    hostile["metrics"]["base_at"]["defense"] = HOSTILE
    folder = workdir(tmp_path, hostile, class_names=[HOSTILE] * 10)
    with (folder / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"stage": HOSTILE, "epoch": 0, HOSTILE: 1.0}) + "\n")
    text = html.write(folder).read_text(encoding="utf-8")
    assert "<script" not in text and escape(HOSTILE) in text
    assert all(link.startswith("data:image/png;base64,") for link in Links(text).links)


def test_the_numbers_on_the_page_are_the_records(page):
    text = unescape(re.sub(r"<[^>]+>", " ", page)).replace("\u202f", " ")
    assert "The trigger worked on 100.0 % of images before purification and works on 1.3 % after" in text
    assert "clean accuracy went from 97.2 % to 95.0 %." in text
    for values in record_dict()["metrics"].values():
        for name, (hits, count) in values["counts"].items():
            assert re.search(rf"{values[name]:.1f}\s+{hits} / {count}", text), (values["defense"], name)
    assert record_dict()["command"] in unescape(re.sub(r"<[^>]+>", "", page))


def test_the_page_says_whether_reactivation_was_tested(tmp_path, page):
    assert "Re-activation was not tested" in page
    tried = record_dict()
    tried["metrics"]["purified"]["r_asr"] = 12.5
    text = html.write(workdir(tmp_path / "tried", tried)).read_text(encoding="utf-8")
    assert "Re-activation was tried on the purified model: R-ASR 12.5\u202f%" in text and "was not tested" not in text


def test_a_run_without_log_and_strip_still_has_a_page(tmp_path):
    (tmp_path / "record.json").write_text(json.dumps(record_dict() | {"metrics": {}}))
    assert "nothing can be said" in html.write(tmp_path).read_text(encoding="utf-8")
    (tmp_path / "record.json").write_text(json.dumps(record_dict()))
    text = html.write(tmp_path).read_text(encoding="utf-8")
    assert (
        words.verdict(records.read(tmp_path / "record.json")) in text
        and 'id="numbers"' in text
        and 'id="curves"' not in text
        and 'id="images"' not in text
    )


def test_the_report_does_not_import_jax():
    code = "import sys, bibau_jax.report.html, bibau_jax.report.tables; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_predictions_of_the_target_are_marked_and_no_others(page):
    assert page.count('class="says hit"') == 4
    assert "triggered image of 1: backdoored model says 0 (the target), purified model says 1" in page
    arrays = {"clean": np.zeros((2, 4, 4, 3), np.uint8), "labels": np.array([0, 1]), "aims": np.array([1, 2])}
    table = strip.table(arrays | {"clean_by_backdoored": np.array([1, 1])}, None)  # every class has its own target
    assert table.count('class="says hit"') == 1


def test_the_difference_row_clips_nothing_and_names_its_factor():
    clean = np.full((1, 4, 4, 3), 100, np.uint8)
    shown, gain = strip.amplified(clean + np.uint8(8), clean)
    assert gain == 15 and (shown == 128 + 15 * 8).all()
    assert strip.amplified(clean, clean)[1] == 1 and (strip.amplified(clean, clean)[0] == 128).all()


def test_values_that_are_not_finite_or_logged_twice_are_left_out():
    lines = [line for line in log_lines() if line["stage"] == "purify/bibau_u"]
    kd = progress.series(lines, "kd", "kd", "linear")
    assert len(kd.points) == 5 and kd.left_out == 1
    assert progress.series(lines, "iewc_quadratic", "", "log").left_out == 1  # it is 0 at the start
    assert progress.series(lines, "fooled", "", "percent").points[0] == (0, 93.0)
    resumed = [{"step": 0, "loss": 3.0}, {"step": 4, "loss": 2.0}, {"step": 4, "loss": 1.0}]
    assert progress.series(resumed, "loss", "", "linear").points == ((0, 3.0), (4, 1.0))  # the later line counts


def test_the_waking_threshold_is_one_over_the_cap(page):
    assert progress.waking_threshold({"defense": {"iewc_cap": 100.0}})[0] == 0.01
    assert progress.waking_threshold({"defense": {"iewc_cap": 100.0, "iewc_form": "hinge"}}) is None
    assert page.count('class="threshold" x1="0" x2="100%"') == 1


def test_ticks_enclose_the_values_and_long_curves_are_thinned():
    for low, high in ((0.0, 0.0), (-3.0, 7.0), (1e-9, 2e-9), (99.0, 99.0), (0.0, 1e6)):
        ticks = figures.linear_ticks(low, high)
        assert ticks[0] <= low <= high <= ticks[-1] and 2 <= len(ticks) <= 8
    for low, high in ((1e-9, 3.0), (1.0, 1.0), (0.02, 0.5)):
        ticks = figures.log_ticks(low, high)
        assert ticks[0] <= low * 1.001 and high <= ticks[-1] * 1.001 and 2 <= len(ticks) <= 7
    kept = figures.thin(range(12_345))  # long curves keep their ends
    assert len(kept) <= figures.MOST_POINTS + 1 and kept[0] == 0 and kept[-1] == 12_344


def test_the_terminal_table_shows_every_model_and_the_verdict(tmp_path):
    record = records.read(workdir(tmp_path, record_dict()) / "record.json")
    console = Console(file=io.StringIO(), width=140)
    console.print(tables.terminal(record))
    text = " ".join(console.file.getvalue().split())
    assert all(words.defense(defense) in text for defense in DEFENSES.values())
    assert "97.2" in text and "812" in text and "Re-activation was not tested" in text


@pytest.fixture
def folder(tmp_path):
    for seed, ca in enumerate((475, 470, 480)):
        (tmp_path / "records" / f"s{seed}").mkdir(parents=True)
        (tmp_path / "records" / f"s{seed}" / "badnets.json").write_text(json.dumps(record_dict(seed, purified_ca=ca)))
    (tmp_path / "records" / "sig.json").write_text(json.dumps(record_dict(0, "sig")))
    return tmp_path / "records"


def built(folder, out):
    code = tables.main([str(folder), "--out", str(out)])
    return code, out.with_suffix(".md").read_bytes(), out.with_suffix(".json").read_bytes()


def test_the_tables_are_byte_identical_when_rebuilt(folder, tmp_path):
    first = built(folder, tmp_path / "results")
    assert first == built(folder, tmp_path / "results") == built(folder, tmp_path / "elsewhere")
    assert first[0] == 0


def test_the_spread_over_seeds_is_the_sample_standard_deviation(folder, tmp_path):
    summary = json.loads(built(folder, tmp_path / "results")[2])["summary"]
    line = next(s for s in summary if s["attack"] == "badnets" and s["defense"] == "bibau_u")
    values = [100.0 * hits / 500 for hits in (475, 470, 480)]
    assert line["ca"] == {"mean": statistics.mean(values), "std": statistics.stdev(values), "n": 3}
    assert line["ca_loss"]["mean"] == pytest.approx(97.2 - statistics.mean(values)) and line["seeds"] == [0, 1, 2]
    alone = next(s for s in summary if s["attack"] == "sig" and s["defense"] == "bibau_u")
    assert alone["ca"]["std"] is None and alone["n"] == 1


def test_rows_come_in_the_order_of_attacks_and_defences_and_unknown_ones_last(folder, tmp_path):
    (folder / "a.json").write_text(json.dumps(record_dict(0, "aardvark")))
    rows = json.loads(built(folder, tmp_path / "results")[2])["rows"]
    assert list(dict.fromkeys(row["attack"] for row in rows)) == ["badnets", "sig", "aardvark"]
    badnets = [row["defense"] for row in rows if row["attack"] == "badnets"]
    assert list(dict.fromkeys(badnets)) == ["none", "clean", "ft", "base_at", "bibau_u"]
    assert rows[0]["model"] == "resnet18 (width 16, stages 1-1-1-1)" and rows[0]["ca_hits"] == 486


def test_a_backdoored_model_told_by_several_records_counts_once(folder, tmp_path):
    (folder / "again.json").write_text(json.dumps(record_dict(0, purified_ca=475)))
    summary = json.loads(built(folder, tmp_path / "results")[2])["summary"]
    assert all(line["n"] == 3 for line in summary if line["attack"] == "badnets")


def test_a_seed_measured_twice_with_other_results_is_marked(folder, tmp_path):
    (folder / "again.json").write_text(json.dumps(record_dict(0, purified_ca=400)))
    _, page, data = built(folder, tmp_path / "results")
    marked = [s["defense"] for s in json.loads(data)["summary"] if s["differs"]]
    assert marked == ["bibau_u"] and "4 †" in page.decode()


def test_runs_with_other_settings_are_lines_of_their_own_where_the_settings_matter(folder, tmp_path):
    other = record_dict(7, purified_ca=400)
    other["config"]["defense"]["iewc_cap"] = 10.0
    other["config"]["attack"]["wanet"] = {"strength": 0.5}  # a setting of another attack, unknown to the older records
    (folder / "other.json").write_text(json.dumps(other))
    _, page, data = built(folder, tmp_path / "results")
    lines = [s for s in json.loads(data)["summary"] if s["attack"] == "badnets"]
    assert {(s["defense"], s["variant"]): s["n"] for s in lines} == {
        **dict.fromkeys([("none", 1), ("clean", 1), ("ft", 1), ("base_at", 1)], 4),
        ("bibau_u", 1): 3,
        ("bibau_u", 2): 1,
    }
    assert next(s for s in lines if s["variant"] == 2)["settings"] == "defense.iewc_cap 10.0 instead of 100.0"
    assert "BI-BAU (U) (settings 2), BadNets: defense.iewc_cap 10.0 instead of 100.0." in page.decode()


def test_a_setting_that_older_records_do_not_name_sets_a_run_apart_where_it_changes_what_was_done(folder, tmp_path):
    for number, (form, balance) in enumerate([("cross_entropy", 0.0), ("margin", 0.0), ("cross_entropy", 0.5)], 7):
        other = record_dict(number, purified_ca=400 + number)
        other["config"]["defense"] |= {"attack_form": form, "balance": balance}
        (folder / f"other_{number}.json").write_text(json.dumps(other))
    lines = json.loads(built(folder, tmp_path / "results")[2])["summary"]
    told = {s["variant"]: (s["n"], s["settings"]) for s in lines if (s["attack"], s["defense"]) == ("badnets", "bibau_u")}
    assert told == {
        1: (4, ""),
        2: (1, "defense.attack_form margin instead of cross_entropy"),
        3: (1, "defense.balance 0.5 instead of none"),
    }


def test_an_ablation_is_a_row_of_its_own_beside_the_whole_method(folder, tmp_path):
    ablated = record_dict(0, purified_ca=400)
    ablated["metrics"]["purified"]["defense"] = "bibau_u:+A"
    (folder / "ablated.json").write_text(json.dumps(ablated))
    rows = json.loads(built(folder, tmp_path / "results")[2])["rows"]
    names = [row["defense"] for row in rows if row["attack"] == "badnets"]
    assert list(dict.fromkeys(names)) == ["none", "clean", "ft", "base_at", "bibau_u", "bibau_u:+A"]
    assert words.defense("bibau_t:base_at") == "BI-BAU (T), Base AT"


def test_a_readme_that_is_not_there_is_one_line_before_anything_is_written(folder, tmp_path, capsys):
    assert tables.main([str(folder), "--out", str(tmp_path / "results"), "--readme", str(tmp_path / "README.md")]) == 1
    assert "there is no file" in capsys.readouterr().err and not (tmp_path / "results.md").exists()


def test_a_corrupted_record_is_named_skipped_and_the_exit_status_is_1(folder, tmp_path, capsys):
    clean = built(folder, tmp_path / "results")
    (folder / "torn.json").write_text('{"config": {"data"')
    (folder / "other.json").write_text('{"not": "a record"}')
    torn = built(folder, tmp_path / "results")
    told = capsys.readouterr().err.splitlines()
    assert torn[0] == 1 and torn[1:] == clean[1:]
    assert len(told) == 2 and "other.json" in told[0] and "torn.json" in told[1]


def test_the_hand_written_introduction_survives(folder, tmp_path):
    out = tmp_path / "results"
    built(folder, out)
    page = out.with_suffix(".md").read_text().replace("<!-- text -->", "<!-- text -->\n# Mine\n\nA | B <b>\n")
    out.with_suffix(".md").write_text(page)
    assert built(folder, out)[1].decode() == page
    (tmp_path / "mine.md").write_text("no markers")
    with pytest.raises(UserError, match="markers"):
        tables.write(folder, tmp_path / "mine")
    assert (tmp_path / "mine.md").read_text() == "no markers"


def test_further_numbers_flow_through_to_rows_and_columns(folder, tmp_path):
    assert b"R-ASR" not in built(folder, tmp_path / "results")[1]
    more = record_dict(3)
    more["metrics"]["purified"] |= {"r_asr": 12.5, "novel_rate": 7.0}
    (folder / "more.json").write_text(json.dumps(more))
    _, page, data = built(folder, tmp_path / "results")
    row = next(row for row in json.loads(data)["rows"] if row["record"] == "more.json" and row["defense"] == "bibau_u")
    assert row["r_asr"] == 12.5 and row["novel_rate"] == 7.0
    assert page.decode().count("| R-ASR |") == 2 and "12.50" in page.decode() and "novel" not in page.decode()


def test_at_a_glance_an_average_is_over_all_attacks_or_is_none():
    def line(attack, defense, variant=1, **means):
        settings = ("", "defense.softened 0.0 instead of 0.5", ", ".join(f"defense.{n} 1 instead of 0" for n in "ab"))[
            variant - 1
        ]
        told = {"dataset": "cifar10", "model": "resnet18", "attack": attack, "defense": defense, "variant": variant}
        told["settings"] = settings
        return told | {name: {"mean": mean} for name, mean in means.items()}

    whole = {"ca_loss": 2.0, "asr": 4.0, "r_asr": 10.0, "q_asr": 1.0}
    lines = [
        line("sig", "ft", **whole | {"r_asr": 90.0}),
        line("badnets", "ft", **whole),
        line("badnets", "bibau_u", **whole),
        line("badnets", "none", ca_loss=0.0, asr=100.0),
        line("sig", "ft", 2, **whole),
        line("sig", "ft", 3, **whole),
    ]
    head, _, *body = tables.glance(lines).splitlines()
    assert head == "| Defence | CA loss, average | ASR, average | R-ASR, average | Q-ASR, average | BadNets | SIG |"
    assert body == [
        "| Fine-tuning | 2.0 | 4.0 | 50.0 | 1.0 | 10.0 | 90.0 |",
        "| BI-BAU (U) | – | – | – | – | 10.0 | – |",
        "| Fine-tuning (softened 0.0 instead of 0.5) | – | – | – | – | – | 10.0 |",
        "| Fine-tuning (a 1, b 1) | – | – | – | – | – | 10.0 |",
    ]
    assert tables.glance(lines[1:4]) == "", "one attack has no average worth a table"
    assert tables.glance([*lines, line("badnets", "ft", **whole) | {"model": "other"}]) == "", "two networks have none together"


def test_an_empty_folder_is_a_one_line_error(tmp_path, capsys):
    assert tables.main([str(tmp_path), "--out", str(tmp_path / "results")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1 and not (tmp_path / "results.md").exists()


def test_a_model_that_several_records_tell_is_listed_once_and_where_most_is_told(tmp_path):
    one, other = record_dict(), record_dict()
    for told in (one, other):
        told["metrics"]["clean"] |= {"model_sha256": "the twin"}
        told["metrics"]["finetuned"] |= {"model_sha256": "tuned"}
    other["metrics"]["clean"] |= {"r_asr": 3.0}
    other["metrics"]["finetuned"] |= {"model_sha256": "tuned otherwise"}
    for name, told in (("a", one), ("b", other)):
        (tmp_path / f"{name}.json").write_text(json.dumps(told))
    found, _ = series.collect(tmp_path)
    listed = [(row["defense"], row["record"]) for row in series.once(series.rows(found)) if row["defense"] in ("clean", "ft")]
    assert listed == [("clean", "b.json"), ("ft", "a.json"), ("ft", "b.json")]
    twin = next(line for line in series.summary(series.rows(found)) if line["defense"] == "clean")
    assert twin["n"] == 1 and twin["r_asr"]["mean"] == 3.0


def test_a_model_without_a_backdoor_has_no_attack(tmp_path):
    told = record_dict()
    told["config"]["implant"] = {"innocent": True}
    (tmp_path / "clean.json").write_text(json.dumps(told))
    (tmp_path / "badnets.json").write_text(json.dumps(record_dict()))
    page, _ = tables.write(tmp_path, tmp_path / "page")
    lines = [line for line in page[0].read_text().splitlines() if "| Fine-tuning |" in line]
    assert [line.split(" | ")[2] for line in lines[:2]] == ["BadNets", "none (clean model)"]
    assert "settings 2" not in page[0].read_text()


@pytest.mark.parametrize("name", PAGES)
def test_published_results_are_what_their_records_say(name, tmp_path):
    page, told = RESULTS / f"{name}.md", RESULTS.parent / "README.md"
    for path in (page, told):
        shutil.copy(path, tmp_path)
    _, broken = tables.write(RESULTS / "records" / name, tmp_path / name)
    again = f"python -m bibau_jax.report.tables results/records/{name} --out results/{name}"
    assert not broken
    for path in (page, page.with_suffix(".json")):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), again
    if any(f"<!-- {kind} {name} -->" in told.read_text() for kind in ("results", "glance")):
        tables.insert(tmp_path / "README.md", tmp_path / name)
        assert (tmp_path / "README.md").read_text() == told.read_text(), f"{again} --readme README.md"
