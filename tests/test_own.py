"""A user's own clean images: a folder of classes or an .npz file."""

import numpy as np
import pytest
from PIL import Image

from bibau_jax.data import own
from bibau_jax.errors import UserError


def write(path, shade, size=(12, 10), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, shade if mode == "L" else (shade, 0, 255 - shade)).save(path)


def classes(folder, *names):
    """Two images a class, the first of them with a red of ten times the class's place."""
    for place, name in enumerate(names):
        write(folder / name / "a.png", 10 * place)
        write(folder / name / "deeper" / "b.png", 200)
    return str(folder)


def shades(found):
    """{label: red of the class's first image}."""
    pairs = zip(found.images.labels.tolist(), found.images.images[:, 0, 0, 0].tolist(), strict=True)
    return {label: red for label, red in pairs if red < 200}


def test_names_count_in_alphabetical_order(tmp_path):
    found = own.read(classes(tmp_path, "dog", "Bird", "cat"))
    assert found.class_names == ("Bird", "cat", "dog") and shades(found) == {0: 10, 1: 20, 2: 0}
    assert found.images.images.shape == (6, 10, 12, 3) and found.images.ids.tolist() == list(range(6))


def test_folders_named_by_numbers_are_those_classes(tmp_path):
    found = own.read(classes(tmp_path, *(f"{number}" for number in range(12))))
    assert shades(found) == {number: 10 * number for number in range(12)}  # alphabetical order would put 10 before 2
    assert found.class_names[10] == "10"
    assert shades(own.read(classes(tmp_path / "padded", "00001", "00000"))) == {1: 0, 0: 10}


@pytest.mark.parametrize("names", [("1", "2"), ("0", "2", "3"), ("1", "01")])
def test_numbers_that_are_not_0_to_the_last_class_are_not_guessed_at(tmp_path, names):
    with pytest.raises(UserError, match=f"numbered, but not 0..{len(names) - 1}; say which class each is by .*classes.txt"):
        own.read(classes(tmp_path, *names))


def test_a_list_of_classes_decides_their_numbers_and_may_name_some_without_images(tmp_path):
    folder = classes(tmp_path, "dog", "cat")
    (tmp_path / "classes.txt").write_text("horse\ndog\n\n cat \nfrog\n")
    found = own.read(folder)
    assert found.class_names == ("horse", "dog", "cat", "frog") and shades(found) == {1: 0, 2: 10}
    (tmp_path / "classes.txt").write_text("\ufeffdog\r\ncat\r\n", encoding="utf-8")  # as Windows writes it
    assert own.read(folder).class_names == ("dog", "cat")
    (tmp_path / "classes.txt").write_text("horse\ndog\n")
    with pytest.raises(UserError, match="classes.txt does not name the subfolder cat"):
        own.read(folder)
    (tmp_path / "classes.txt").write_text("cat\ndog\ncat\n")
    with pytest.raises(UserError, match="classes.txt names cat twice"):
        own.read(folder)


def test_grey_pictures_become_rgb_among_coloured_ones_and_stay_grey_among_themselves(tmp_path):
    for folder, mode in ((tmp_path / "mixed", "RGB"), (tmp_path / "grey", "L")):
        write(folder / "a" / "1.jpg", 70, mode="L")
        write(folder / "b" / "1.png", 30, mode=mode)
    mixed, grey = (own.read(str(tmp_path / name)).images.images for name in ("mixed", "grey"))
    assert mixed.shape == (2, 10, 12, 3) and mixed[1, 0, 0].tolist() == [30, 0, 225]
    np.testing.assert_allclose(mixed[0].astype(int), 70, atol=1)
    assert grey.shape == (2, 10, 12, 1)


def test_images_of_several_sizes_need_one_to_be_named(tmp_path):
    folder = classes(tmp_path, "a", "b")
    write(tmp_path / "b" / "wide.png", 3, size=(40, 10))
    with pytest.raises(UserError, match=r"a/a.png is 12x10, .*b/wide.png is 40x10; --config.data.image_size resizes them"):
        own.read(folder)
    assert own.read(folder, image_size=16).images.images.shape == (5, 16, 16, 3)
    with pytest.raises(UserError, match="image_size must be at least 1: 0"):
        own.read(folder, image_size=0)


def test_a_folder_that_cannot_be_used_is_one_line(tmp_path):
    def fails(words, folder=tmp_path):
        with pytest.raises(UserError, match=words) as error:
            own.read(str(folder))
        assert "\n" not in str(error.value)

    fails("nowhere does not exist", tmp_path / "nowhere")
    fails("must hold one subfolder of pictures for each of at least two classes")
    write(tmp_path / "a" / "1.png", 1)
    fails("at least two classes")
    (tmp_path / "b").mkdir()
    fails("b holds no picture")
    (tmp_path / "b" / "1.png").write_text("no picture")
    fails(r"b/1.png is no picture")
    write(tmp_path / "b" / "1.png", 1, size=(12, 10))
    (tmp_path / "b" / "1.png").write_bytes((tmp_path / "b" / "1.png").read_bytes()[:45])
    fails(r"b/1.png cannot be read: ")
    write(tmp_path / "b" / "1.png", 1)
    write(tmp_path / "stray.jpg", 1)
    fails("stray.jpg lies beside the subfolders of the classes")


IMAGES = np.arange(6 * 4 * 5 * 3, dtype=np.uint8).reshape(6, 4, 5, 3)
LABELS = np.array([0, 2, 0, 2, 4, 4])


def test_an_npz_file_gives_its_images_as_they_are(tmp_path):
    np.savez(tmp_path / "clean.npz", images=IMAGES, labels=LABELS.astype(np.uint16), more=np.zeros(3))
    found = own.read(str(tmp_path / "clean.npz"))
    np.testing.assert_array_equal(found.images.images, IMAGES)
    assert found.images.labels.tolist() == LABELS.tolist() and found.class_names == ("0", "1", "2", "3", "4")
    assert own.read(str(tmp_path / "clean.npz"), image_size=8).images.images.shape == (6, 8, 8, 3)


def test_an_array_and_the_same_pictures_in_files_shrink_alike(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 21, 17, 3), np.uint8)
    np.savez(tmp_path / "clean.npz", images=pixels, labels=[0, 0, 1, 1])
    for place, image in enumerate(pixels):
        write(path := tmp_path / "folder" / str(place // 2) / f"{place}.png", 0)
        Image.fromarray(image).save(path)
    one, other = (own.read(str(tmp_path / name), image_size=8).images for name in ("clean.npz", "folder"))
    np.testing.assert_array_equal(one.images, other.images)
    np.testing.assert_array_equal(one.labels, other.labels)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": IMAGES / 255, "labels": LABELS}, "images must be uint8, 0..255, not float64"),
        ({"images": IMAGES[..., 0], "labels": LABELS}, r"images must be \[N, H, W, C\] .* not \[6, 4, 5\]"),
        ({"images": IMAGES.transpose(0, 3, 1, 2), "labels": LABELS}, r"images must be \[N, H, W, C\] .* not \[6, 3, 4, 5\]"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, r"not \[0, 4, 5, 3\]"),
        ({"images": IMAGES, "labels": LABELS[:5]}, r"labels must be whole numbers \[6\], not int64 \[5\]"),
        ({"images": IMAGES, "labels": LABELS + 0.5}, r"labels must be whole numbers \[6\], not float64 \[6\]"),
        ({"images": IMAGES, "labels": LABELS - 1}, r"labels must count classes from 0 on, found -1..3"),
        ({"images": IMAGES, "labels": LABELS * 10**9}, r"labels must count classes from 0 on, found 0..4000000000"),
        ({"images": IMAGES, "labels": LABELS * 0}, "at least two classes"),
        ({"images": IMAGES, "y": LABELS}, "holds no array labels, only images, y"),
        ({"images": IMAGES, "labels": LABELS.astype(object)}, "cannot be read as .npz"),
    ],
)
def test_an_npz_file_with_wrong_arrays_is_one_line(tmp_path, arrays, message):
    np.savez(tmp_path / "clean.npz", **arrays)
    with pytest.raises(UserError, match=message) as error:
        own.read(str(tmp_path / "clean.npz"))
    assert "clean.npz" in str(error.value) and "\n" not in str(error.value)


def saved(path, images, labels) -> str:
    np.savez(path, images=images, labels=labels)
    return str(path)


def test_copies_within_a_class_count_once_and_grey_pictures_are_shown_in_colour(tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (6, 10, 12, 1)).astype(np.uint8)
    labels = np.arange(6) % 2
    twice = saved(tmp_path / "twice.npz", np.concatenate([images, images[:2]]), np.concatenate([labels, labels[:2]]))
    found = own.read(twice, channels=3).images
    np.testing.assert_array_equal(found.images, images.repeat(3, 3))
    in_colour = saved(tmp_path / "colour.npz", images.repeat(3, 3), labels)  # grey pictures that were saved as RGB
    np.testing.assert_array_equal(own.read(in_colour, channels=1).images.images, images)
    red = np.zeros((4, 2, 2, 3), np.uint8) + np.array([[[[255, 0, 0]]]], np.uint8) * np.ones((4, 1, 1, 1), np.uint8)
    assert (own.read(saved(tmp_path / "red.npz", red, np.arange(4) % 2), channels=1).images.images == 76).all()  # 0.299 * 255
    assert found.labels.tolist() == labels.tolist() and found.ids.tolist() == list(range(6))
    assert "2 of 8 images are there more than once and left out" in capsys.readouterr().err
    other = saved(tmp_path / "other.npz", np.concatenate([images, images[:1]]), np.append(labels, 1))
    assert len(own.read(other).images) == 7  # of two classes: which of both is right is not ours to say


def test_test_images_are_of_the_same_size_and_classes_and_none_that_is_trained_on(tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (8, 10, 12, 3)).astype(np.uint8)
    labels = np.arange(8) % 2
    mine = own.read(saved(tmp_path / "mine.npz", images[:4], labels[:4]))
    some = own.read_test(saved(tmp_path / "test.npz", images[2:], labels[2:]), mine)
    assert (some.images == images[4:]).all() and some.labels.tolist() == [0, 1, 0, 1]
    assert "2 of 6 images are among the clean ones and left out" in capsys.readouterr().err
    with pytest.raises(UserError, match="no image that is not among the clean ones"):
        own.read_test(str(tmp_path / "mine.npz"), mine)
    doubled = saved(tmp_path / "large.npz", images.repeat(2, 1).repeat(2, 2), labels)
    with pytest.raises(UserError, match=r"differ in size \(20x24x3 and 10x12x3\)"):
        own.read_test(doubled, mine)
    small = own.read(saved(tmp_path / "m.npz", 255 - images[:4], labels[:4]), image_size=9)
    assert len(own.read_test(doubled, small, image_size=9)) == 8
    named = own.read(classes(tmp_path / "named", "bird", "cat"))
    assert len(own.read_test(saved(tmp_path / "numbered.npz", images, labels), named)) == 8
    with pytest.raises(UserError, match=r"not of the clean images' classes \(0, 1, 2 and bird, cat\)"):
        own.read_test(saved(tmp_path / "three.npz", images, np.arange(8) % 3), named)
    with pytest.raises(UserError, match=r"\(cat, dog and bird, cat\)"):
        own.read_test(classes(tmp_path / "other", "cat", "dog"), named)


def test_images_that_would_fill_the_memory_are_refused_before_they_are_read(tmp_path, monkeypatch):
    folder = classes(tmp_path / "images", "cat", "dog")
    np.savez(tmp_path / "clean.npz", images=IMAGES, labels=LABELS)
    for path, many in ((folder, 4), (tmp_path / "clean.npz", 6)):
        with pytest.raises(UserError, match=f"{many} images of 100,000 x 100,000 pixels would take [0-9]+ GiB of memory"):
            own.read(str(path), image_size=100_000)
    monkeypatch.setattr(own, "MOST_BYTES", 4 * 12 * 10 * 3 - 1)
    with pytest.raises(UserError, match="4 images of 10 x 12 pixels would take"):
        own.read(folder)


def test_a_file_that_is_no_npz_is_one_line(tmp_path):
    np.savez(tmp_path / "whole.npz", images=IMAGES, labels=LABELS)
    np.save(tmp_path / "one.npy", IMAGES)
    whole, array = ((tmp_path / name).read_bytes() for name in ("whole.npz", "one.npy"))
    absurd = whole.replace(b"'shape': (6, 4, 5, 3), }    ", b"'shape': (6, 4, 5, 3" + b"0" * 6 + b")}")
    assert len(absurd) == len(whole) and absurd != whole
    for content in (b"", b"text", whole[:200], array, whole.replace(bytes([9, 10]), bytes([9, 9])), absurd):
        (tmp_path / "clean.npz").write_bytes(content)
        with pytest.raises(UserError, match="is no folder and cannot be read as .npz") as error:
            own.read(str(tmp_path / "clean.npz"))
        assert "\n" not in str(error.value)
