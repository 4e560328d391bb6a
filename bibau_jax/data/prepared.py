"""Published data sets, prepared once from their archives with TFDS (array_record, no TensorFlow) and read back whole."""

import contextlib
import dataclasses
import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from bibau_jax import progress
from bibau_jax.data import Dataset, ImageSet, archives
from bibau_jax.errors import UserError

IMAGES_PER_RECORD = 1_000  # one image a record would take seconds to read back instead of a fraction of one
VERSION = "1.0.0"


@dataclasses.dataclass(frozen=True, eq=False)
class Published:
    """A data set as it is published.

    name: of the data set. folder: of the prepared form. title: what people call it. read: from the folder in which the archives
    lie to the whole set. counts: the published numbers of images by split; `partial` lets archives hold other numbers, which is
    said. class_names: () keeps those that `read` finds.
    """

    name: str
    folder: str
    title: str
    homepage: str
    archives: tuple[archives.Archive, ...]
    read: Callable[[Path], Dataset]
    counts: Mapping[str, int]
    class_names: tuple[str, ...] = ()
    partial: bool = False


def get(published: Published, *, data_dir=None, manual_dir=None, download: bool = True) -> Dataset:
    """The data set, whole and in memory; the first call prepares it in `data_dir` from its archives.

    The arguments are those of `bibau_jax.data.load`. UserError, in one line, where something is missing or damaged.
    """
    root = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    place = root / published.folder / VERSION
    try:
        if not place.exists():
            sought = (published.title, published.archives, root)
            _prepare(published, root, place, archives.find(*sought, manual_dir=manual_dir, download=download))
    except OSError as error:
        raise UserError(
            f"cannot prepare {published.title} in {root} ({error.strerror or error}); "
            "set --config.data.data_dir to a directory that can be written"
        ) from error
    dataset = _read_back(published, place)
    found = {"train": len(dataset.train), "test": len(dataset.test)}
    if found != published.counts:
        train, test = (f"{found[split]} of {published.counts[split]}" for split in ("train", "test"))
        progress.say(f"{published.title}: {train} training and {test} test images, which is what {place} was prepared from")
    return dataset


def check_size(name: str, image_size: int) -> None:
    """Refuses a side that no picture can be shrunk to."""
    if image_size < 1:
        raise UserError(f"data.{name}.image_size must be at least 1: {image_size}")


class Records(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """TFDS builder of one data set in memory; a record holds up to 1,000 consecutive images.

    images: uint8 [n, H, W, C]. labels, ids, and groups where there are any: int32 [n].
    """

    VERSION = tfds.core.Version(VERSION)

    def __init__(self, published: Published, dataset: Dataset, root: Path):
        self.name, self.published, self.dataset = published.folder, published, dataset
        super().__init__(data_dir=root, file_format="array_record")

    def _info(self):
        def feature(array):
            return tfds.features.Tensor(shape=(None, *array.shape[1:]), dtype=array.dtype.type, encoding="bytes")

        features = {name: feature(array) for name, array in _arrays(self.dataset.train).items()}
        kept = None if self.published.class_names else tfds.core.MetadataDict(class_names=list(self.dataset.class_names))
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{self.published.title} in records of many images.",
            features=tfds.features.FeaturesDict(features),
            homepage=self.published.homepage,
            metadata=kept,
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(getattr(self.dataset, split)) for split in self.published.counts}

    def _generate_examples(self, images: ImageSet):
        for start in range(0, len(images), IMAGES_PER_RECORD):
            yield start, _arrays(images.take(slice(start, start + IMAGES_PER_RECORD)))


def _arrays(images: ImageSet) -> dict[str, np.ndarray]:
    arrays = {field.name: getattr(images, field.name) for field in dataclasses.fields(images)}
    return {name: array for name, array in arrays.items() if array is not None}


def _prepare(published, root, place, folder):
    progress.say(f"preparing {published.title} from {_shown(published, folder)} in {place}")
    (root / published.folder).mkdir(parents=True, exist_ok=True)  # what cannot be written is told before images are read
    dataset = published.read(folder)
    try:
        with _quiet():
            builder = Records(published, dataset, root)
            # Written beside its final place and renamed when whole, so a run cut off leaves nothing that passes for it.
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    except OSError:
        # Another process may have finished first; its result is as good.
        if not place.exists():
            raise


def _shown(published, folder):
    return folder / published.archives[0].name if len(published.archives) == 1 else folder


def _read_back(published, place) -> Dataset:
    try:
        with _quiet():
            builder = tfds.builder_from_directory(os.fspath(place))
            parts = {split: _read_split(builder, split) for split in published.counts}
        for split, images in parts.items():
            if not (published.partial or len(images) == published.counts[split]):
                raise ValueError(f"{len(images)} images in {split}")
        return Dataset(
            published.name, **parts, class_names=published.class_names or tuple(builder.info.metadata["class_names"])
        )
    except Exception as error:  # the readers below raise whatever they like on a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"the prepared {published.title} in {place} is damaged ({reason}); delete it and start again"
        ) from error


def _read_split(builder, split) -> ImageSet:
    source = builder.as_data_source(split)
    records = sorted((source[i] for i in range(len(source))), key=lambda record: record["ids"][0])
    images = ImageSet(**{name: np.concatenate([record[name] for record in records]) for name in records[0]})
    if not np.array_equal(images.ids, np.arange(len(images))):
        raise ValueError(f"{len(images)} images in {split}")
    return images


@contextlib.contextmanager
def _quiet():
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
