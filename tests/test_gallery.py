"""The picture of all attacks, and how much of an image they leave."""

import json

import numpy as np
import pytest
from PIL import Image

from bibau_jax import attacks, experiment
from bibau_jax.attacks import gallery
from bibau_jax.errors import UserError
from bibau_jax.metrics import likeness

RNG = np.random.default_rng(0)


def test_psnr_is_that_of_the_mean_squared_error():
    images = RNG.integers(0, 200, (3, 16, 16, 3)).astype(np.uint8)
    np.testing.assert_allclose(likeness.psnr(images, images + 5), 10 * np.log10(255**2 / 25))
    assert np.isinf(likeness.psnr(images, images)).all()


def test_ssim_is_1_for_the_same_image_and_falls_with_what_is_added():
    images = RNG.integers(50, 200, (3, 24, 24, 3)).astype(np.uint8)
    np.testing.assert_allclose(likeness.ssim(images, images), 1.0)
    values = [
        likeness.ssim(images, (images + RNG.normal(0, strength, images.shape)).clip(0, 255).astype(np.uint8)).mean()
        for strength in (2, 10, 40)
    ]
    assert 1 > values[0] > values[1] > values[2] > 0
    patched = images.copy()
    patched[:, -3:, -3:] = 255
    assert (likeness.ssim(images, patched) < 0.999).all()  # a corner counts


def test_ssim_of_flat_images_is_the_formula():
    dark, bright = np.full((1, 16, 16, 1), 100, np.uint8), np.full((1, 16, 16, 1), 150, np.uint8)
    c = (0.01 * 255) ** 2
    np.testing.assert_allclose(likeness.ssim(dark, bright), (2 * 100 * 150 + c) / (100**2 + 150**2 + c))


def test_the_picture_has_a_row_for_every_attack_that_can_be_stamped(tiny_config, tmp_path, capsys):
    made, test = gallery.rows(tiny_config(), [], [])
    assert {row.name for row in made} == set(attacks.names()) - {"iad", "issba", "narcissus"} - attacks.FROM_FILES
    assert "left out: iad, issba, narcissus; triggers that are trained" in "".join(capsys.readouterr())
    assert [row.name for row in made][:2] == ["badnets", "blended"] and all(0 < row.psnr < 60 for row in made)
    gallery.draw(made, test.images, [0, 1], tmp_path / "gallery.png")
    width, height = Image.open(tmp_path / "gallery.png").size
    assert width > 600 and height > 100 * len(made)


@pytest.mark.slow
def test_a_run_is_drawn_with_the_trigger_that_it_implanted(tiny_config, tmp_path):
    experiment.run(tiny_config({"attack.name": "wanet"}, stages="implant"), str(tmp_path / "run"))
    made, _ = gallery.rows(tiny_config(), ["badnets"], [str(tmp_path / "run")])
    assert [row.name for row in made] == ["badnets", "wanet"]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    with pytest.raises(UserError, match="is a run on digits, not on cifar10"):
        (run := tiny_config())["data"]["name"] = "cifar10"
        gallery.check_run(config, run, "here")
