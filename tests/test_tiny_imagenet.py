"""The Tiny-ImageNet builder, on a tiny archive in the publisher's layout; the real images where they are at hand."""

import io
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bibau_jax import data
from bibau_jax.data import tiny_imagenet
from bibau_jax.errors import UserError

SHARED = Path(__file__).parents[2] / "shared" / "data"
ROOT = "tiny-imagenet-200"
IDS = [f"n{10_000_000 + 7 * number:08d}" for number in range(200)]
ARCHIVE = tiny_imagenet.ARCHIVE.name


def jpeg(shade, mode="RGB"):
    Image.new(mode, (64, 64), shade if mode == "L" else (shade, 100, 100)).save(stream := io.BytesIO(), "JPEG")
    return stream.getvalue()


def members():
    """Two training images a class, one of them grey, and a test image for the last and the first; ids out of order."""
    content = {f"{ROOT}/wnids.txt": "\n".join(IDS[::-1]) + "\n"}
    content[f"{ROOT}/words.txt"] = "n00000001\tentity\n" + "".join(f"{one}\tname {one[-3:]}, other\n" for one in IDS[:-1])
    for number, one in enumerate(IDS):
        for place, image in ((10, jpeg(number)), (9, jpeg(number, "L"))):
            content[f"{ROOT}/train/{one}/images/{one}_{place}.JPEG"] = image
        content[f"{ROOT}/train/{one}/{one}_boxes.txt"] = "0 0 63 63"
    notes = [f"val_{place}.JPEG\t{one}\t0\t0\t63\t63" for place, one in enumerate((IDS[199], IDS[0]))]
    content[f"{ROOT}/val/val_annotations.txt"] = "\n".join(notes) + "\n"
    content |= {f"{ROOT}/val/images/val_{place}.JPEG": jpeg(shade) for place, shade in enumerate((199, 0))}
    return content | {f"{ROOT}/test/images/test_0.JPEG": jpeg(1)}


def write(folder, content):
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / ARCHIVE, "w") as archive:
        for member, inside in content.items():
            archive.writestr(member, inside)
    return folder


@pytest.fixture(scope="module")
def manual(tmp_path_factory):
    return write(tmp_path_factory.mktemp("manual"), members())


def test_classes_go_by_wordnet_id_and_images_by_number(manual, tmp_path, capsys):
    dataset = data.load("tiny_imagenet", data_dir=tmp_path, manual_dir=manual)
    again = data.load("tiny_imagenet", data_dir=tmp_path, download=False)
    assert again.class_names == dataset.class_names == (*(f"name {one[-3:]}" for one in IDS[:-1]), IDS[-1])
    np.testing.assert_array_equal(again.train.images, dataset.train.images)
    np.testing.assert_array_equal(dataset.train.labels, np.repeat(np.arange(200), 2))
    assert dataset.test.labels.tolist() == [199, 0] and dataset.image_shape == (32, 32, 3)
    grey, coloured = dataset.train.images[::2, 0, 0].astype(int), dataset.train.images[1::2, 0, 0].astype(int)
    np.testing.assert_allclose(grey, np.arange(200)[:, None].repeat(3, 1), atol=1)
    np.testing.assert_allclose(coloured[:, 0], np.arange(200), atol=3)
    np.testing.assert_allclose(dataset.test.images[:, 0, 0, 0].astype(int), [199, 0], atol=3)
    assert dataset.train.groups is None
    assert "Tiny-ImageNet: 400 of 100000 training and 2 of 10000 test images" in capsys.readouterr().err


def test_each_size_is_prepared_by_itself(manual, tmp_path):
    sizes = [data.load("tiny_imagenet", data_dir=tmp_path, manual_dir=manual, image_size=size) for size in (64, 8)]
    assert [dataset.image_shape[0] for dataset in sizes] == [64, 8]
    assert sorted(path.name for path in tmp_path.glob("tiny*")) == ["tiny_imagenet_64", "tiny_imagenet_8"]


FIRST = f"{ROOT}/train/{IDS[0]}/images/{IDS[0]}_"
NOTES = f"{ROOT}/val/val_annotations.txt"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{ROOT}/wnids.txt": None}, "holds no wnids.txt"),
        ({f"{ROOT}/wnids.txt": "\n".join(IDS[:150])}, "wnids.txt names 150 classes instead of 200"),
        ({f"{ROOT}/words.txt": None}, "holds no words.txt"),
        ({f"{FIRST}9.JPEG": None, f"{FIRST}10.JPEG": None}, f"there is no training image of class {IDS[0]}"),
        ({f"{ROOT}/train/n99999999/images/n99999999_0.JPEG": jpeg(1)}, "n99999999_0.JPEG is of class n99999999, which wnids"),
        ({f"{ROOT}/val/images/val_1.JPEG": None}, "holds no val_1.JPEG"),
        ({NOTES: None}, "holds no val_annotations.txt"),
        ({NOTES: ""}, "val_annotations.txt lists no image"),
        ({NOTES: "val_0.JPEG\n"}, "val_0.JPEG is of class None, which wnids.txt does not name"),
        ({f"{FIRST}9.JPEG": b"no"}, f"{IDS[0]}_9.JPEG is no picture"),
        ({f"{FIRST}9.JPEG": jpeg(1)[:600]}, f"{IDS[0]}_9.JPEG cannot be read"),
    ],
)
def test_an_archive_with_wrong_content_is_refused_in_one_line(tmp_path, changes, message):
    content = {name: inside for name, inside in (members() | changes).items() if inside is not None}
    with pytest.raises(UserError) as error:
        tiny_imagenet.load(data_dir=tmp_path / "data", manual_dir=write(tmp_path / "manual", content))
    said = str(error.value)
    assert message in said and ARCHIVE in said and "--config.data.manual_dir" in said and "\n" not in said
    assert not list(tmp_path.glob("data/tiny*/*"))


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "make_archives.py").is_file(), reason="the real images are not at hand")
def test_the_real_validation_images_come_back_at_their_own_size(tmp_path, monkeypatch):
    subprocess.check_call([sys.executable, SHARED / "make_archives.py", tmp_path / "manual", "tiny_imagenet"], cwd=SHARED)
    dataset = data.load("tiny_imagenet", data_dir=tmp_path / "data", manual_dir=tmp_path / "manual", image_size=64)
    monkeypatch.syspath_prepend(str(SHARED))
    monkeypatch.delitem(sys.modules, "load_data", raising=False)
    from load_data import load_tiny_imagenet_val

    original = load_tiny_imagenet_val()
    np.testing.assert_array_equal(dataset.test.images, original["images"])
    ids = np.array(original["wnids"])
    np.testing.assert_array_equal(np.sort(ids)[dataset.test.labels], ids[original["labels"]])
