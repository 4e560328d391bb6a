"""scikit-learn's handwritten digits: small, real and part of the installation, for quick runs without any download."""

import numpy as np
from sklearn import datasets

from bibau_jax.data import Dataset, ImageSet
from bibau_jax.data.splits import evenly_chosen

TEST_SIZE = 500


def load(*, data_dir=None, manual_dir=None, download: bool = True) -> Dataset:
    """1,297 training and 500 test digits, 16 x 16 x 1, always divided the same way.

    The 8 x 8 originals (0..16) are stretched to 0..255 and doubled in size. ids: the place in scikit-learn's order.
    Nothing is read from or written to a directory; the arguments are those of every data set.
    Source: E. Alpaydin and C. Kaynak, "Optical recognition of handwritten digits", UCI, 1998.
    """
    digits = datasets.load_digits()
    images = np.rint(double_size(digits.images) * (255 / 16)).astype(np.uint8)[..., None]
    everything = ImageSet(images, digits.target.astype(np.int32), np.arange(len(images), dtype=np.int32))
    is_test = evenly_chosen(everything.labels, TEST_SIZE)
    names = tuple(str(digit) for digit in range(10))
    return Dataset("digits", everything.take(~is_test), everything.take(is_test), names)


def double_size(images: np.ndarray) -> np.ndarray:
    """Images [N, H, W] enlarged to [N, 2H, 2W] by bilinear interpolation, half-pixel centres, edges repeated."""
    for axis in (1, 2):
        last = images.shape[axis] - 1
        before = np.take(images, np.maximum(np.arange(last + 1) - 1, 0), axis)
        after = np.take(images, np.minimum(np.arange(last + 1) + 1, last), axis)
        pairs = np.stack([0.75 * images + 0.25 * before, 0.75 * images + 0.25 * after], axis + 1)
        images = pairs.reshape(*images.shape[:axis], -1, *images.shape[axis + 1 :])
    return images
