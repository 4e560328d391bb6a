"""The GTSRB builder, on tiny archives in the publisher's layout; the real images where they are at hand."""

import io
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bibau_jax import data, experiment, keys
from bibau_jax.data import gtsrb, splits
from bibau_jax.errors import UserError

SHARED = Path(__file__).parents[2] / "shared" / "data"
HEAD = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"
TRAINING, TEST, TRUTH = (archive.name for archive in gtsrb.ARCHIVES)


def sign(label, width=40, height=44):
    """A grey margin of five pixels around a field whose red is the class."""
    pixels = np.full((height, width, 3), 128, np.uint8)
    pixels[5:-5, 5:-5] = (label, 200, 0)
    return pixels


def ppm(pixels):
    Image.fromarray(pixels).save(stream := io.BytesIO(), "PPM")
    return stream.getvalue()


def row(name, label, width=40, height=44):
    return f"{name};{width};{height};5;5;{width - 5};{height - 5};{label}"


def members():
    """Two tracks of two frames for each class, one test image a class in reverse order."""
    training, frames = {}, [f"{track:05d}_{frame:05d}.ppm" for track in (0, 3) for frame in (0, 1)]
    for label in range(43):
        place = f"GTSRB/Final_Training/Images/{label:05d}"
        training |= {f"{place}/{name}": ppm(sign(label)) for name in frames}
        training[f"{place}/GT-{label:05d}.csv"] = "\n".join([HEAD, *(row(name, label) for name in frames)])
    names = [f"{number:05d}.ppm" for number in range(43)]
    test = {f"GTSRB/Final_Test/Images/{name}": ppm(sign(42 - number)) for number, name in enumerate(names)}
    truth = "\r\n".join([HEAD, *(row(name, 42 - number) for number, name in enumerate(names))])
    return {TRAINING: training, TEST: test, TRUTH: {"GT-final_test.csv": truth}}


def write(folder, archives):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in archives.items():
        with zipfile.ZipFile(folder / name, "w") as archive:
            for member, inside in content.items():
                archive.writestr(member, inside)
    return folder


@pytest.fixture(scope="module")
def manual(tmp_path_factory):
    return write(tmp_path_factory.mktemp("manual"), members())


@pytest.fixture(scope="module")
def loaded(manual, tmp_path_factory):
    return data.load("gtsrb", data_dir=tmp_path_factory.mktemp("data"), manual_dir=manual)


def test_images_labels_and_tracks_come_in_the_publishers_order(loaded):
    assert loaded.num_classes == 43 and loaded.class_names[14] == "stop" and loaded.image_shape == (32, 32, 3)
    np.testing.assert_array_equal(loaded.train.labels, np.repeat(np.arange(43), 4))
    np.testing.assert_array_equal(loaded.test.labels, np.arange(43)[::-1])
    for part in (loaded.train, loaded.test):
        np.testing.assert_array_equal(part.images[:, 16, 16, 0], part.labels)
        np.testing.assert_array_equal(part.ids, np.arange(len(part)))
    assert loaded.train.groups[:8].tolist() == [0, 0, 3, 3, 100_000, 100_000, 100_003, 100_003]
    assert len(set(loaded.test.groups.tolist())) == 43


def test_a_prepared_set_needs_no_archive_and_says_how_many_images_it_lacks(manual, loaded, tmp_path, capsys):
    folder = tmp_path / "data"
    gtsrb.load(data_dir=folder, manual_dir=manual)
    capsys.readouterr()
    again = gtsrb.load(data_dir=folder, download=False)
    for name in ("images", "labels", "ids", "groups"):
        np.testing.assert_array_equal(getattr(again.train, name), getattr(loaded.train, name))
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("GTSRB: 172 of 39209 training and 43 of 12630 test images")


def test_the_whole_picture_is_shrunk_unless_the_signs_box_is_asked_for(manual, loaded, tmp_path):
    np.testing.assert_array_equal(loaded.train.images[0, 0, 0], [128, 128, 128])
    cut = data.load("gtsrb", data_dir=tmp_path, manual_dir=manual, image_size=20, roi=True)
    assert cut.image_shape == (20, 20, 3) and (cut.train.images[:4] == [0, 200, 0]).all()
    assert (cut.test.images[..., 0] == cut.test.labels[:, None, None]).all()
    assert [path.name for path in tmp_path.glob("gtsrb*")] == ["gtsrb_20_roi"]


def test_shrinking_averages_over_the_pixels_that_it_leaves_out(manual, tmp_path):
    archives = members()
    stripes = np.zeros((320, 320, 3), np.uint8)
    stripes[:, ::2] = 255  # every second column: picking pixels would give 0 or 255
    archives[TEST]["GTSRB/Final_Test/Images/00000.ppm"] = ppm(stripes)
    shrunk = gtsrb.load(data_dir=tmp_path, manual_dir=write(tmp_path / "manual", archives)).test.images[0]
    assert 120 < shrunk.min() <= shrunk.max() < 135


def wrong(change, archive=TRAINING):
    archives = members()
    change(archives[archive])
    return {archive: archives[archive]}


PLACE = "GTSRB/Final_Training/Images/00007"
TABLE = f"{PLACE}/GT-00007.csv"


@pytest.mark.parametrize(
    ("archives", "message"),
    [
        (wrong(lambda m: m.pop(TABLE)), "holds no 00007/GT-00007.csv"),
        (wrong(lambda m: m.pop(f"{PLACE}/00003_00001.ppm")), "holds no 00007/00003_00001.ppm"),
        (wrong(lambda m: m.update({TABLE: HEAD})), "00007/GT-00007.csv lists no image"),
        (wrong(lambda m: m.update({TABLE: "a;b\n1;2"})), "00007/GT-00007.csv is no table of images"),
        (wrong(lambda m: m.update({TABLE: m[TABLE].replace(";7", ";seven")})), "00007/GT-00007.csv is no table of images"),
        (wrong(lambda m: m.update({TABLE: m[TABLE].replace(";7", ";8")})), "is of class 8 in the folder of class 7"),
        (wrong(lambda m: m.update({TABLE: m[TABLE].replace(";7", ";43")})), "labels must lie in 0..42, found 43..43"),
        (wrong(lambda m: m.update({f"{PLACE}/00000_00000.ppm": b"no"})), "00007/00000_00000.ppm is no picture"),
        (wrong(lambda m: m.update({f"{PLACE}/00000_00000.ppm": ppm(sign(7))[:900]})), "00000_00000.ppm cannot be read"),
        (wrong(lambda m: m.pop("GT-final_test.csv"), TRUTH), "holds no GT-final_test.csv"),
        (wrong(lambda m: m.update({k: v.replace("00042.ppm", "00043.ppm") for k, v in m.items()}), TRUTH), "no 00043.ppm"),
        (wrong(lambda m: m.clear(), TEST), "holds no 00000.ppm"),
    ],
)
def test_archives_with_wrong_content_are_refused_in_one_line(manual, tmp_path, archives, message):
    folder = write(tmp_path / "manual", {TEST: members()[TEST], TRUTH: members()[TRUTH], TRAINING: {}} | members() | archives)
    with pytest.raises(UserError) as error:
        gtsrb.load(data_dir=tmp_path / "data", manual_dir=folder)
    said = str(error.value)
    assert message in said and next(iter(archives)) in said and "--config.data.manual_dir" in said and "\n" not in said
    assert not list(tmp_path.glob("data/gtsrb_32/*"))


@pytest.mark.parametrize(
    "damage",
    [lambda c: c[: len(c) // 2], lambda c: b"", lambda c: c.replace(b"P6", b"P7").replace(b"Filename", b"Pilename")],
    ids=["truncated", "empty", "other bytes"],
)
@pytest.mark.parametrize("name", [TRAINING, TEST, TRUTH])
def test_a_damaged_archive_is_named(manual, tmp_path, name, damage):
    folder = write(tmp_path / "manual", members())
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    with pytest.raises(UserError, match=f"{name} is damaged or no .zip archive .*--config.data.manual_dir"):
        gtsrb.load(data_dir=tmp_path / "data", manual_dir=folder)


def test_a_box_outside_its_image_is_refused_where_it_is_asked_for(tmp_path):
    changed = wrong(lambda m: m.update({TABLE: m[TABLE].replace(";40;44;5;", ";40;44;50;")}))
    folder = write(tmp_path / "manual", members() | changed)
    with pytest.raises(UserError, match=r"00007/00000_00000.ppm cannot be read: the box \(50, 5, 35, 39\) does not lie in"):
        gtsrb.load(data_dir=tmp_path / "data", manual_dir=folder, roi=True)


def test_of_three_archives_the_one_that_is_missing_is_named(tmp_path):
    folder = write(tmp_path / "manual", {TRAINING: {}, TRUTH: {}})
    with pytest.raises(UserError, match=f"no {TEST} in .*{TRAINING}, {TEST}, {TRUTH} from https://.* they lie in"):
        gtsrb.load(data_dir=tmp_path / "data", manual_dir=folder)
    with pytest.raises(UserError, match="GTSRB is not in .* switched off"):
        gtsrb.load(data_dir=tmp_path / "data", download=False)
    with pytest.raises(UserError, match="data.gtsrb.image_size must be at least 1: 0"):
        gtsrb.load(image_size=0)


@pytest.mark.slow
def test_a_whole_run_on_traffic_signs_and_its_model_on_those_signs_alone(manual, tmp_path, tiny_config):
    changes = {"data.name": "gtsrb", "data.data_dir": str(tmp_path / "data"), "data.manual_dir": str(manual)}
    changes |= {"data.train_size": 0, "data.clean_size": 45, "model.mean": (0.0,) * 3, "model.std": (1.0,) * 3}
    record = experiment.run(tiny_config(changes, **{"defense.name": "ft"}), str(tmp_path / "run"))
    assert record.metrics["purified"].ca.count == 43 and record.metrics["purified"].asr.count == 42
    reuse = changes | {"implant.reuse": str(tmp_path / "run"), "data.gtsrb.roi": True}
    with pytest.raises(UserError, match=r"trained with other settings \(data.gtsrb.roi: False -> True\)"):
        experiment.run(tiny_config(reuse), str(tmp_path / "other"))


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "make_archives.py").is_file(), reason="the real images are not at hand")
def test_the_real_archives_are_the_real_set_divided_by_track(tmp_path, monkeypatch):
    subprocess.check_call([sys.executable, SHARED / "make_archives.py", tmp_path / "manual", "gtsrb"], cwd=SHARED)
    dataset = data.load("gtsrb", data_dir=tmp_path / "data", manual_dir=tmp_path / "manual")
    monkeypatch.syspath_prepend(str(SHARED))
    monkeypatch.delitem(sys.modules, "load_data", raising=False)
    from load_data import load_mosaic

    original = load_mosaic("gtsrb")
    for split, part in (("train", dataset.train), ("test", dataset.test)):
        np.testing.assert_array_equal(part.labels, original[f"{split}_labels"])
        np.testing.assert_array_equal(part.images, original[f"{split}_images"])
    assert len(np.unique(dataset.train.groups)) == 1307
    parts = splits.divide(keys.root(0), dataset.train, train_size=0, clean_size=500, validation_size=1000)
    assert len(parts.validation) == 1000 and not set(parts.validation.groups) & set(parts.train.groups)
    assert len(parts.train) + len(parts.validation) > len(dataset.train) - 9  # at most one track is cut
