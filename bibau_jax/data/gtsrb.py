"""GTSRB, the German traffic sign recognition benchmark, from its publisher's three zip archives."""

from pathlib import Path

import numpy as np

from bibau_jax.data import Dataset, ImageSet, archives, prepared, zipped

PLACE = "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370"
TRAINING, TEST, TRUTH = ARCHIVES = tuple(
    archives.Archive(name, f"{PLACE}/{name}", "md5", digest)
    for name, digest in (
        ("GTSRB_Final_Training_Images.zip", "f33fd80ac59bff73c82d25ab499e03a3"),
        ("GTSRB_Final_Test_Images.zip", "c7e4e6327067d32654124b0fe9e82185"),
        ("GTSRB_Final_Test_GT.zip", "fe31e9c9270bbcd7b84b7f21a9d9d9e5"),
    )
)
SETTINGS = archives.settings(ARCHIVES)
TRACKS_PER_CLASS = 100_000  # more than five digits can count
LIMITS = (20, 30, 50, 60, 70, 80)
CLASS_NAMES = (
    *(f"speed limit {limit}" for limit in LIMITS),
    *("end of speed limit 80", "speed limit 100", "speed limit 120", "no overtaking", "no overtaking by lorries"),
    *("priority at the next crossing", "priority road", "give way", "stop", "no vehicles", "no lorries", "no entry"),
    *("danger", "bend to the left", "bend to the right", "double bend", "bumpy road", "slippery road", "road narrows"),
    *("road works", "traffic lights", "pedestrians", "children", "cyclists", "snow or ice", "wild animals"),
    *("end of all limits", "turn right", "turn left", "straight on", "straight on or right", "straight on or left"),
    *("keep right", "keep left", "roundabout", "end of no overtaking", "end of no overtaking by lorries"),
)


def load(*, image_size: int = 32, roi: bool = False, data_dir=None, manual_dir=None, download: bool = True) -> Dataset:
    """GTSRB: 39,209 training and 12,630 test images of 43 classes, squashed to squares, ids in the publisher's order.

    image_size: side in pixels; each size is prepared by itself. roi: cut images to the sign's annotated box first; the whole
    picture, with its margin of about a tenth, is what BackdoorBench takes. groups: of training images the track, up to 30
    frames of one sign; test images stand alone. Archives with fewer images will do, and that is said. UserError, in one line,
    where something is missing or damaged.
    Source: Stallkamp et al., "The German Traffic Sign Recognition Benchmark", IJCNN 2011.
    """
    prepared.check_size("gtsrb", image_size)
    published = prepared.Published(
        name="gtsrb",
        folder=f"gtsrb_{image_size}{'_roi' if roi else ''}",
        title="GTSRB",
        homepage="https://benchmark.ini.rub.de/gtsrb_dataset.html",
        archives=ARCHIVES,
        read=lambda folder: read(folder, image_size, roi),
        counts={"train": 39_209, "test": 12_630},
        class_names=CLASS_NAMES,
        partial=True,
    )
    return prepared.get(published, data_dir=data_dir, manual_dir=manual_dir, download=download)


def read(folder: Path, image_size: int, roi: bool) -> Dataset:
    """The set from the archives in a folder, which may have been packed anew; UserError where their content is wrong."""
    with zipped.opened(folder / TRAINING.name, SETTINGS, depth=2) as members:
        rows = [row for label in range(len(CLASS_NAMES)) for row in _of_class(members, label)]
        train = _images(members, rows, image_size, roi, [_track(members, name, label) for name, label, _ in rows])
    with zipped.opened(folder / TRUTH.name, SETTINGS) as members:
        rows = _rows(members, "GT-final_test.csv")
    with zipped.opened(folder / TEST.name, SETTINGS) as members:
        test = _images(members, rows, image_size, roi, range(len(rows)))
    return Dataset("gtsrb", train, test, CLASS_NAMES)


def _of_class(members, label):
    rows = _rows(members, f"{label:05d}/GT-{label:05d}.csv")
    for name, told, _ in rows:
        if told != label:
            raise members.wrong(f"{name} is of class {told} in the folder of class {label}")
    return [(f"{label:05d}/{name}", label, box) for name, _, box in rows]


def _rows(members, table) -> list[tuple[str, int, tuple]]:
    """(file, class, box of the sign) of every image in a table."""
    try:
        rows = [
            (row["Filename"], int(row["ClassId"]), tuple(int(row[f"Roi.{corner}"]) for corner in ("X1", "Y1", "X2", "Y2")))
            for row in members.table(table, delimiter=";")
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise members.wrong(f"{table} is no table of images ({error})") from error
    if not rows:
        raise members.wrong(f"{table} lists no image")
    labels = [label for _, label, _ in rows]
    if not 0 <= min(labels) <= max(labels) < len(CLASS_NAMES):
        raise members.wrong(f"{table}: labels must lie in 0..{len(CLASS_NAMES) - 1}, found {min(labels)}..{max(labels)}")
    return rows


def _track(members, name, label) -> int:
    number = name.rpartition("/")[2].partition("_")[0]
    if not number.isdecimal() or int(number) >= TRACKS_PER_CLASS:
        raise members.wrong(f"{name} is not named after a track and a frame")
    return label * TRACKS_PER_CLASS + int(number)


def _images(members, rows, image_size, roi, groups) -> ImageSet:
    names, labels, boxes = zip(*rows, strict=True)
    images = members.pictures(names, image_size, boxes if roi else None)
    return ImageSet(images, *(np.array(values, np.int32) for values in (labels, range(len(rows)), groups)))
