"""The settings of each data set, and the toy size of any of them."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from bibau_jax import experiment

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
ONE_FILE_A_SET = sorted(
    path.stem for path in (ROOT / "configs").glob("[!_]*.py") if path.stem not in ("base", "toy", "own_model")
)


@pytest.mark.parametrize("name", ONE_FILE_A_SET)
def test_every_data_set_takes_an_attack_and_has_a_toy_size(name):
    config = importlib.import_module(f"configs.{name}").get_config("blended")
    assert config.attack.name == "blended"
    toy = importlib.import_module("configs.toy").get_config(name)
    assert toy.attack.name == "badnets" and toy.model.width in (8, 64)
    kept = ("data.name", "data.flip", "model.name", "model.mean")
    assert all(toy.to_dict()[a][b] == config.to_dict()[a][b] for a, b in (name.split(".") for name in kept))


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "make_archives.py").is_file(), reason="the real images are not at hand")
@pytest.mark.parametrize("name", ["gtsrb", "tiny_imagenet", "cifar10_vit"])
def test_the_toy_size_of_a_data_set_runs_to_its_end(name, tmp_path):
    subprocess.check_call(
        [sys.executable, SHARED / "make_archives.py", tmp_path / "manual", name.partition("_vit")[0]], cwd=SHARED
    )
    config = importlib.import_module("configs.toy").get_config(name).to_dict()
    config["data"] |= {"manual_dir": str(tmp_path / "manual"), "data_dir": str(tmp_path / "data")}
    record = experiment.run(config, str(tmp_path / "run"))
    assert {"backdoored", "clean", "purified", "finetuned"} <= record.metrics.keys()
