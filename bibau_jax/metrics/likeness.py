"""How much of an image a trigger leaves: PSNR and SSIM between uint8 images, one number an image."""

import numpy as np
from scipy.ndimage import gaussian_filter


def psnr(images: np.ndarray, changed: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB, float64 [N], of uint8 images [N, H, W, C]; infinite where nothing changed."""
    error = np.mean((images.astype(np.float64) - changed) ** 2, axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255**2 / error)


def ssim(images: np.ndarray, changed: np.ndarray) -> np.ndarray:
    """Structural similarity, float64 [N], at most 1, of uint8 images [N, H, W, C]; the mean over channels.

    Gaussian window of standard deviation 1.5 over 11 pixels, K = 0.01 and 0.03 (Wang et al., 2004). The image is mirrored at
    its border, so that a patch in the corner counts like any other.
    """

    def local(values):
        return gaussian_filter(values, (0, 1.5, 1.5, 0), truncate=5 / 1.5)

    x, y = images.astype(np.float64), changed.astype(np.float64)
    mean_x, mean_y = local(x), local(y)
    var_x, var_y = local(x * x) - mean_x**2, local(y * y) - mean_y**2
    covariance = local(x * y) - mean_x * mean_y
    small, smaller = (0.03 * 255) ** 2, (0.01 * 255) ** 2
    value = (2 * mean_x * mean_y + smaller) * (2 * covariance + small)
    value /= (mean_x**2 + mean_y**2 + smaller) * (var_x + var_y + small)
    return value.mean((1, 2, 3))
