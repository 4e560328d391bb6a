"""A user's own pictures: a folder of them, or a subfolder a class."""

import numpy as np
import pytest
from PIL import Image

from bibau_jax.data import folder
from bibau_jax.errors import UserError


def write(path, shade, size=(40, 30), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, shade if mode == "L" else (shade, 0, 255 - shade)).save(path)


def test_pictures_are_squashed_to_one_size_and_to_the_channels_asked_for(tmp_path):
    write(tmp_path / "b.png", 200)
    write(tmp_path / "a.jpg", 10, mode="L")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "more").mkdir()
    coloured, grey = (folder.pictures(str(tmp_path), 16, 20, channels) for channels in (3, 1))
    assert coloured.shape == (2, 16, 20, 3) and grey.shape == (2, 16, 20, 1) and coloured.dtype == np.uint8
    assert (coloured[0] == 10).all() and (coloured[1] == [200, 0, 55]).all()


def test_subfolders_are_classes_by_name_and_pictures_may_lie_deeper(tmp_path):
    write(tmp_path / "dog" / "images" / "1.png", 50)
    write(tmp_path / "dog" / "0.png", 40)
    write(tmp_path / "cat" / "2.PNG", 90)
    (tmp_path / "cat" / "boxes.txt").write_text("1 2 3 4")
    (tmp_path / "words.txt").write_text("cat dog")
    found, names = folder.labelled(str(tmp_path), 16, 16, 3)
    assert names == ("cat", "dog") and found.labels.tolist() == [0, 1, 1] and found.ids.tolist() == [0, 1, 2]
    assert found.images[:, 0, 0, 0].tolist() == [90, 40, 50]


def test_a_folder_that_cannot_be_used_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere is no folder with pictures"):
        folder.pictures(str(tmp_path / "nowhere"), 16, 16, 3)
    for place in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError, match="must hold one subfolder of pictures for each of at least two classes"):
            folder.classes(str(place))
    write(tmp_path / "cat" / "1.png", 3)
    (tmp_path / "dog").mkdir()
    with pytest.raises(UserError, match="dog holds no picture"):
        folder.classes(str(tmp_path))
    (tmp_path / "dog" / "1.png").write_text("not a picture")
    with pytest.raises(UserError, match=r"1\.png is no picture"):
        folder.labelled(str(tmp_path), 16, 16, 3)
    write(tmp_path / "dog" / "1.png", 5, size=(400, 400))
    whole = (tmp_path / "dog" / "1.png").read_bytes()
    broken = whole[:60] + bytes(255 - byte for byte in whole[60:80]) + whole[80:]
    for content in (whole[: len(whole) // 2], broken, b"P5 4 4 255\n\x00", b"P5 4 x 255\n"):
        (tmp_path / "dog" / "1.png").write_bytes(content)
        with pytest.raises(UserError, match=r"1\.png (cannot be read: |is no picture)"):
            folder.labelled(str(tmp_path), 16, 16, 3)


def test_grey_values_of_16_bits_keep_their_range(tmp_path):
    ramp = np.linspace(0, 65535, 32).astype(np.uint16)[None].repeat(32, 0)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    shown = folder.pictures(str(tmp_path), 32, 32, 1)[0, 0, :, 0].astype(int)
    np.testing.assert_allclose(shown, ramp[0] // 256, atol=1)
