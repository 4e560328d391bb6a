"""Weights back into files: what is written is what is read, by PyTorch too, and nothing is ever written over."""

import ml_dtypes
import numpy as np
import pytest

from bibau_jax.errors import UserError
from bibau_jax.importers import export, torch_file

ARRAYS = {
    "module.conv.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2),
    "module.half": np.float16([1, 2.5]),
    "module.brain": np.array([[1.5], [-2]], ml_dtypes.bfloat16),
    "module.num_batches_tracked": np.array(7, np.int64),
    "module.flag": np.array([True, False]),
    "module.nothing": np.zeros((0, 3), np.float32),
}
EITHER = pytest.mark.parametrize("suffix", export.SUFFIXES.values())


@EITHER
def test_what_is_written_is_read_back_bit_by_bit(suffix, tmp_path):
    export.write(tmp_path / f"model{suffix}", ARRAYS)
    found = torch_file.read(tmp_path / f"model{suffix}")
    assert found.prefix == "module."
    back = {found.prefix + name: array for name, array in found.arrays.items()}
    assert set(back) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert back[name].dtype == array.dtype and back[name].shape == array.shape, name
        assert back[name].tobytes() == array.tobytes(), name
    if suffix == ".pth":
        assert list(back) == list(ARRAYS)  # a safetensors file keeps its own order


@EITHER
def test_pytorch_reads_it_without_executing_anything(suffix, tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / f"model{suffix}"
    export.write(path, ARRAYS)
    if suffix == ".pth":
        found = torch.load(path, weights_only=True)
    else:
        found = pytest.importorskip("safetensors.torch").load_file(path)
    assert set(found) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert tuple(found[name].shape) == array.shape
        np.testing.assert_array_equal(found[name].double().numpy(), array.astype(np.float64))


def test_arrays_that_share_no_memory_in_pytorchs_layout_keep_their_values(tmp_path):
    turned = np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1)
    for suffix in export.SUFFIXES.values():
        export.write(tmp_path / f"turned{suffix}", {"w": turned})
        np.testing.assert_array_equal(torch_file.read(tmp_path / f"turned{suffix}").arrays["w"], turned)


@EITHER
def test_nothing_is_written_over(suffix, tmp_path):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"mine")
    with pytest.raises(UserError, match="exists already"):
        export.write(path, ARRAYS)
    with pytest.raises(UserError, match="is the file that was read"):
        export.write(path, ARRAYS, source=path)
    assert path.read_bytes() == b"mine" and list(tmp_path.iterdir()) == [path]


def test_what_has_no_name_in_the_format_leaves_nothing_behind(tmp_path):
    with pytest.raises(UserError, match="have no PyTorch storage"):
        export.write(tmp_path / "model.pth", {"w": np.zeros(2, np.complex64)})
    with pytest.raises(UserError, match="written as .safetensors or .pth"):
        export.write(tmp_path / "model.onnx", ARRAYS)
    assert not list(tmp_path.iterdir())
