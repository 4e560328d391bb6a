"""Reading files that others wrote: exactly what PyTorch put in, and nothing that was put there to run."""

import contextlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from bibau_jax.errors import UserError
from bibau_jax.importers import export, pickled, torch_file

FOLDER = Path(__file__).parent / "torch"


@pytest.fixture(scope="module")
def expected():
    with np.load(FOLDER / "checkpoints.npz") as file:
        return dict(file)


def of(expected, group) -> dict:
    return {name.removeprefix(f"{group}/"): value for name, value in expected.items() if name.startswith(f"{group}/")}


# --- what is read


@pytest.mark.parametrize("format_", ["zip", "legacy"])
def test_every_kind_of_tensor_is_what_pytorch_wrote(format_, expected):
    found = torch_file.read(FOLDER / f"{format_}.pth")
    wanted = of(expected, "weights")
    assert found.format == format_ and (found.container, found.prefix) == ("", "")
    assert list(found.arrays) == list(wanted)
    for name, array in found.arrays.items():
        np.testing.assert_array_equal(array.astype(np.float32), wanted[name], err_msg=name)
    kinds = {name: found.arrays[name].dtype for name in ("half", "brain", "double", "mask", "bytes", "bn.num_batches_tracked")}
    assert list(kinds.values()) == [np.float16, ml_dtypes.bfloat16, np.float64, np.bool_, np.uint8, np.int64]
    assert all(array.flags.owndata and array.flags.c_contiguous for array in found.arrays.values())


def test_weights_are_found_within_a_checkpoint_and_their_prefix_is_taken_off(expected):
    found = torch_file.read(FOLDER / "checkpoint.pth")
    assert (found.container, found.prefix) == ("state_dict", "module.")
    for name, value in of(expected, "model").items():
        np.testing.assert_array_equal(found.arrays[name].astype(np.float32), value)


def test_a_file_at_home_is_found_again_and_one_that_is_gone_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(FOLDER / "zip.pth", tmp_path / "m.pth")
    assert torch_file.sha256("~/m.pth") == torch_file.sha256(FOLDER / "zip.pth") and torch_file.read("~/m.pth").arrays
    with pytest.raises(UserError, match="~/gone.pth: No such file or directory"):
        torch_file.sha256("~/gone.pth")


def test_one_of_several_sets_of_weights_is_chosen_by_its_usual_name_or_by_the_users():
    assert torch_file.read(FOLDER / "two.pth").container == "net"
    assert torch_file.read(FOLDER / "two.pth", "ema").container == "ema"
    with pytest.raises(UserError, match='two.pth: it has no weights under "teacher"; it has them under "net", "ema"'):
        torch_file.read(FOLDER / "two.pth", "teacher")


def test_safetensors_are_read_with_their_types(tmp_path):
    from safetensors.numpy import save_file

    arrays = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([1, 2], np.int64)}
    save_file(arrays, tmp_path / "model.pth")  # told apart by its content
    found = torch_file.read(tmp_path / "model.pth")
    assert found.format == "safetensors" and all(np.array_equal(found.arrays[name], arrays[name]) for name in arrays)


def test_brain_floats_of_safetensors_are_read(tmp_path):
    values = np.array([1.5, -2.0], ml_dtypes.bfloat16)
    header = json.dumps({"x": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + values.tobytes())
    found = torch_file.read(tmp_path / "m.safetensors").arrays["x"]
    assert found.dtype == ml_dtypes.bfloat16 and found.tolist() == [1.5, -2.0]


# --- what is refused


class Calls:
    """Pickles to a call of anything."""

    def __init__(self, what, *arguments):
        self.what, self.arguments = what, arguments

    def __reduce__(self):
        return self.what, self.arguments


def as_zip(path: Path, data: bytes, **entries: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        for name, content in entries.items():
            archive.writestr(f"archive/data/{name}", content)
    return path


def as_legacy(path: Path, data: bytes) -> Path:
    parts = [torch_file.LEGACY_MAGIC, torch_file.LEGACY_PROTOCOL, {"little_endian": True}]
    path.write_bytes(b"".join(pickle.dumps(part, 2) for part in parts) + data + pickle.dumps([], 2))
    return path


@pytest.mark.parametrize("write", [as_zip, as_legacy])
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize(
    "call, words",
    [
        (lambda mark: Calls(os.system, f"touch {mark}"), "refers to posix.system"),
        (lambda mark: Calls(eval, f"open({str(mark)!r}, 'w')"), "refers to (builtins|__builtin__).eval"),
        (lambda mark: Calls(getattr, os, "system"), "(builtins|__builtin__).getattr|GLOBAL"),
        (lambda mark: Calls(__import__, "antigravity"), "(builtins|__builtin__).__import__"),
        (lambda mark: Calls(shutil.rmtree, str(mark.parent)), "refers to shutil.rmtree"),
        (lambda mark: {"state_dict": {"w": 1}, "x": [Calls(os.unlink, str(mark))]}, "refers to posix.unlink"),
    ],
)
def test_a_pickle_that_calls_something_is_refused_and_nothing_is_called(call, words, protocol, write, tmp_path):
    mark = tmp_path / "kept" / "mark"
    mark.parent.mkdir()
    made = call(mark)
    if isinstance(made, Calls) and made.arguments and made.arguments[0] is os:
        made.arguments = ("os", "system")  # a module cannot be pickled
    path = write(tmp_path / "hostile.pth", pickle.dumps(made, protocol))
    with pytest.raises(UserError, match=words) as caught:
        torch_file.read(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert mark.parent.exists() and not mark.exists()


def test_a_whole_pickled_model_is_refused_with_the_way_out():
    with pytest.raises(
        UserError, match=r"it holds a whole pickled model \(torch.nn.modules.container.Sequential\) and not its"
    ):
        torch_file.read(FOLDER / "module.pth")


def tensor(shape, stride, size=4, offset=0, kind="FloatStorage", key="0") -> bytes:
    """The pickle of {"w": a tensor}, written by hand."""
    out = io.BytesIO()

    class Pickler(pickle._Pickler):
        def persistent_id(self, value):
            return value.reference if isinstance(value, Held) else None

    class Held:
        reference = None

    class Rebuilt:
        def __init__(self, storage):
            self.storage = storage

        def __reduce__(self):
            return names["_rebuild_tensor_v2"], (self.storage, offset, shape, stride, False, {})

    names = {}
    for module, name in (("torch._utils", "_rebuild_tensor_v2"), ("torch", kind)):
        made = type(name, (), {}) if name == kind else (lambda *a: None)
        made.__module__, made.__qualname__, made.__name__ = module, name, name
        names[name] = made
    held = Held()
    held.reference = ("storage", names[kind], key, "cpu", size)
    pickler = Pickler(out, 2)
    pickler.save_global = lambda obj, name=None: pickler.write(f"c{obj.__module__}\n{obj.__name__}\n".encode())
    pickler.dispatch = dict(pickle._Pickler.dispatch)
    for kind_of in (type, type(lambda: 0)):
        pickler.dispatch[kind_of] = lambda self, obj: self.save_global(obj)
    pickler.dump({"w": Rebuilt(held), "v": Rebuilt(held)})
    return out.getvalue()


@pytest.mark.parametrize(
    "given, words",
    [
        ({"shape": (2, 3), "stride": (3, 1)}, r"w of shape \[2, 3\] reaches beyond its storage of 4 elements"),
        ({"shape": (4,), "stride": (1,), "offset": 1}, "reaches beyond its storage"),
        ({"shape": (10**9, 10**9), "stride": (0, 0)}, "its tensors would take"),
        ({"shape": (2,), "stride": (1, 1)}, "w has 1 sizes and 2 strides"),
        ({"shape": (4,), "stride": (-1,)}, "the pickle is damaged"),
        ({"shape": (4,), "stride": (1,), "size": 10**15}, "shorter than the pickle says|would take"),
        ({"shape": (4,), "stride": (1,), "key": "../../etc/passwd"}, 'storage "../../etc/passwd" is missing'),
        (
            {"shape": (4,), "stride": (1,), "kind": "QuantizedStorage"},
            'tensors of type "torch.QuantizedStorage" cannot be read',
        ),
    ],
)
def test_absurd_tensors_are_refused_before_they_take_memory(given, words, tmp_path):
    path = as_zip(tmp_path / "m.pth", tensor(**given), **{"0": b"\0" * 16})
    with pytest.raises(UserError, match=words):
        torch_file.read(path)


def test_a_tensor_written_by_hand_is_read(tmp_path):
    path = as_zip(tmp_path / "m.pth", tensor((2, 2), (1, 2)), **{"0": np.arange(4, dtype="<f4").tobytes()})
    assert torch_file.read(path).arrays["w"].tolist() == [[0, 2], [1, 3]]


def test_files_that_are_something_else_are_named(tmp_path, expected):
    wrong = {
        "empty": (b"", "it is empty"),
        "text": (b"hello, I am a model", "no PyTorch or safetensors file"),
        "pointer.pth": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
        "page.pth": (b"<!DOCTYPE html><html>Log in</html>", "a web page: was the download refused"),
        "keras.h5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5, of Keras"),
        "list": (pickle.dumps([1, 2]), "but none that PyTorch wrote|damaged"),
        "cut.pth": ((FOLDER / "zip.pth").read_bytes()[:-200], "damaged or cut off"),
        "cut_legacy.pth": ((FOLDER / "legacy.pth").read_bytes()[:-10], "cut off"),
        "short.safetensors": (struct.pack("<Q", 50) + b"{" + bytes(60), "no safetensors file that can be read"),
    }
    for name, (content, words) in wrong.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=words):
            torch_file.read(tmp_path / name)
    with pytest.raises(UserError, match="a NumPy archive and no PyTorch file"):
        torch_file.read(FOLDER / "checkpoints.npz")
    with pytest.raises(UserError, match="nowhere.pth: No such file or directory"):
        torch_file.read(tmp_path / "nowhere.pth")
    os.mkfifo(tmp_path / "pipe.pth")
    for path, words in ((tmp_path, "it is a folder"), (tmp_path / "pipe.pth", "pipe.pth: it is no ordinary file")):
        for reading in (torch_file.read, torch_file.sha256):
            with pytest.raises(UserError, match=words):
                reading(path)
    with pytest.raises(UserError, match="it holds no weights"):
        torch_file.read(as_zip(tmp_path / "none.pth", pickle.dumps({"epoch": 3}, 2)))


def test_bombs_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pickled, "MOST_OPERATIONS", 60_000)
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}, 2))
        archive.writestr("a/data/0", bytes(50_000_000))
    with pytest.raises(UserError, match="unpacks to many times its size"):
        torch_file.read(tmp_path / "bomb.pth")
    endless = b"\x80\x02" + b"K\x00" * (pickled.MOST_OPERATIONS + 1) + b"."
    with pytest.raises(UserError, match="more than 60,000 operations"):
        torch_file.read(as_zip(tmp_path / "endless.pth", endless))
    pairs = b"(" + b"K\x01K\x02\x86" * 9_000 + b"l"
    again = b"\x80\x02ccollections\nOrderedDict\nq\x00" + pairs + b"\x85q\x01" + b"h\x00h\x01R0" * 5_000 + b"N."
    with pytest.raises(UserError, match="copies without end"):
        torch_file.read(as_zip(tmp_path / "copies.pth", again))
    deep = b"\x80\x02)" + b"\x85" * 50_000 + b"q\x00h\x00h\x00\x86."
    with pytest.raises(UserError, match="it holds no weights|damaged"):
        torch_file.read(as_zip(tmp_path / "deep.pth", deep))
    huge_memo = b"\x80\x02}r\xff\xff\xff\xff."
    with pytest.raises(UserError, match="it holds no weights"):
        torch_file.read(as_zip(tmp_path / "memo.pth", huge_memo))
    long = b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"abc."
    with pytest.raises(UserError, match="damaged or cut off"):
        torch_file.read(as_zip(tmp_path / "long.pth", long))


def test_more_entries_than_any_checkpoint_are_refused_before_they_take_memory(tmp_path, monkeypatch):
    path = as_zip(tmp_path / "m.pth", tensor((2, 2), (1, 2)), **{"0": np.arange(4, dtype="<f4").tobytes()})
    assert list(torch_file.read(path).arrays) == ["w", "v"]
    monkeypatch.setattr(torch_file, "MOST_TENSORS", 1)
    with pytest.raises(UserError, match="it holds 2 tensors, more than any network"):
        torch_file.read(path)
    monkeypatch.setattr(torch_file, "MOST_ENTRIES", len(zipfile.ZipFile(path).infolist()) - 1)
    monkeypatch.setattr(zipfile, "ZipFile", None)
    with pytest.raises(UserError, match="more entries than any checkpoint"):
        torch_file.read(path)


def test_a_safetensors_type_that_numpy_lacks_is_named(tmp_path):
    header = b'{"w":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}'
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(2))
    with pytest.raises(UserError, match='tensors of type "float8_e4m3fn" cannot be read'):
        torch_file.read(tmp_path / "m.safetensors")


def text(value: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value


def tangle(depth: int) -> dict:
    """Dictionaries of a thousand names each for the same dictionary one below: as many paths as a thousand to the `depth`."""
    return {} if not depth else dict.fromkeys((f"k{number}" for number in range(1000)), tangle(depth - 1))


def test_small_files_that_would_take_for_ever_are_refused_at_once(tmp_path):
    path = as_zip(tmp_path / "tangle.pth", pickle.dumps(tangle(4), 2))
    with pytest.raises(UserError, match="it holds no weights"):
        torch_file.read(path)
    # Numbers that are all hashed to 0.
    colliding = b"".join(b"\x8a\x0c" + ((2**61 - 1) * number).to_bytes(12, "little") + b"N" for number in range(1, 100_000))
    with pytest.raises(UserError, match="it holds no weights"):
        torch_file.read(as_zip(tmp_path / "colliding.pth", b"\x80\x02}(" + colliding + b"u."))
    huge = b"\x8b" + struct.pack("<i", 2**22) + b"\x01" * 2**22
    reference = b"(" + text(b"storage") + b"ctorch\nFloatStorage\n" + text(b"0") + text(b"cpu") + b"K\x04tQ"
    shape = b"(" + huge + b"q\x01" + b"h\x01" * 15 + b"t" + b"(" + b"h\x01" * 16 + b"t"
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n(" + reference + b"K\x00" + shape + b"\x89)tR"
    with pytest.raises(UserError, match="a number of 33,554,425 bits"):
        torch_file.read(as_zip(tmp_path / "huge.pth", b"\x80\x02}" + text(b"w") + rebuilt + b"s."))


def test_what_a_message_shows_of_a_file_is_short_and_nothing_that_a_terminal_obeys(tmp_path):
    for module in (b"evil" * 100_000, b"os\x1b[2J\x1b]0;owned\x07\xe2\x80\xae"):
        path = as_zip(tmp_path / "shown.pth", b"\x80\x04" + text(module) + text(b"system") + b"\x93.")
        with pytest.raises(UserError, match="the pickle refers to") as caught:
            torch_file.read(path)
        assert len(str(caught.value)) < 400 and str(caught.value).isprintable()


def test_what_lies_among_the_tensors_and_is_none_is_told(tmp_path):
    data = tensor((2, 2), (1, 2))
    there = data[:-2] + text(b"_extra_state") + b"N" + text(b"version") + b"K\x03" + b"u."
    found = torch_file.read(as_zip(tmp_path / "m.pth", there, **{"0": np.arange(4, dtype="<f4").tobytes()}))
    assert list(found.arrays) == ["w", "v"] and found.others == ("_extra_state", "version")


def test_a_tensor_under_a_number_is_no_weight_and_is_told(tmp_path):
    data = tensor((2, 2), (1, 2))
    there = data[:-2] + b"K\x00" + tensor((2, 2), (1, 2))[2:-1] + b"K\x01" + text(b"plain") + b"u."
    found = torch_file.read(as_zip(tmp_path / "m.pth", there, **{"0": np.arange(4, dtype="<f4").tobytes()}))
    assert list(found.arrays) == ["w", "v"] and len(found.others) == 1


def test_prefixes_are_taken_off_one_behind_the_other(expected):
    arrays = {f"module._orig_mod.net.{name}": np.zeros(1) for name in ("conv.weight", "fc.bias")}
    found = torch_file._named(arrays, "zip")
    assert found.prefix == "module._orig_mod." and list(found.arrays) == ["net.conv.weight", "net.fc.bias"]
    inner = torch_file.without_common_prefix(found)
    assert inner.prefix == "module._orig_mod.net." and list(inner.arrays) == ["conv.weight", "fc.bias"]
    assert torch_file.without_common_prefix(inner) is None


def test_a_storage_is_read_once_however_many_tensors_show_it(tmp_path, monkeypatch):
    read, asked = zipfile.ZipFile.read, []
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda self, entry, *rest: asked.append(entry) or read(self, entry, *rest))
    begin = b"ctorch._utils\n_rebuild_tensor_v2\n((" + text(b"storage") + b"ctorch\nFloatStorage\n"
    keys = [begin + text(key) + text(b"cpu") + b"K\x04tQK\x00(K\x02t(K\x01t\x89)tR" for key in (b"0", b"1")]
    views = b"".join(text(b"w%d" % number) + keys[number % 2] for number in range(400))
    parts = {key: np.arange(4, dtype="<f4").tobytes() for key in "01"}
    found = torch_file.read(as_zip(tmp_path / "m.pth", b"\x80\x02}(" + views + b"u.", **parts))
    assert len(found.arrays) == 400 and list(found.arrays)[:2] == ["w0", "w1"] and found.arrays["w399"].tolist() == [0, 1]
    assert len(asked) == 3  # the pickle and two storages


@pytest.mark.parametrize("how", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_damaged_compressed_files_are_one_line(how, tmp_path):
    whole, rng = recompressed((FOLDER / "zip.pth").read_bytes(), how), random.Random(0)
    if how == zipfile.ZIP_DEFLATED:
        (tmp_path / "m.pth").write_bytes(whole)
        assert len(torch_file.read(tmp_path / "m.pth").arrays) > 4
    for _ in range(100):
        (tmp_path / "m.pth").write_bytes(mutated(whole, rng))
        with contextlib.suppress(UserError):
            torch_file.read(tmp_path / "m.pth")


def recompressed(data: bytes, how: int) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(out, "w", how) as made:
        for entry in archive.infolist():
            made.writestr(entry.filename, archive.read(entry))
    return out.getvalue()


def test_tensors_of_objects_that_are_left_out_do_not_damage_a_legacy_file(tmp_path):
    kept = tensor((2, 2), (1, 2))[2:-1]  # without its protocol and its end
    inert = b"ccollections\ndefaultdict\nc__builtin__\nlist\n\x85R(" + text(b"x") + tensor((4,), (1,), key="1")[2:-1] + b"u"
    whole = b"\x80\x02}(" + text(b"state_dict") + kept + text(b"stats") + inert + b"u."
    path = as_legacy(tmp_path / "m.pth", whole)
    values = struct.pack("<q", 4) + np.arange(4, dtype="<f4").tobytes()
    path.write_bytes(path.read_bytes()[: -len(pickle.dumps([], 2))] + pickle.dumps(["0", "1"], 2) + values * 2)
    assert torch_file.read(path).arrays["w"].tolist() == [[0, 2], [1, 3]]


SEEDS = ("zip.pth", "legacy.pth", "checkpoint.pth", "module.pth")


def mutated(data: bytes, rng: random.Random) -> bytes:
    """The bytes with a few of them flipped, cut out, doubled, or replaced by others that mean something to a pickle."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        kind, at = rng.randrange(5), rng.randrange(max(len(data), 1))
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at : at + rng.choice([1, 10, 1000])]
        elif kind == 2:
            data[at:at] = data[at : at + rng.choice([1, 50])]
        elif kind == 3:
            data[at] = rng.choice(b"().0NRbcdh}]qrtuQ\x80\x85\x86\x87\x88\x8a\x8b\x93\xff\x00")
        else:
            data[at : at + 8] = struct.pack("<q", rng.choice([-1, 2**31, 2**62, 0]))
        if not data:
            break
    return bytes(data)


def inner(name: str, data: bytes, rng: random.Random) -> bytes:
    """A zip file's pickle mutated within an intact archive: what a checksum would else find first."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for entry, content in entries.items():
            archive.writestr(entry, mutated(content, rng) if entry.endswith(name) else content)
    return out.getvalue()


@pytest.fixture
def bounded():
    """Two gigabytes more than the process has, and a minute, for what must not take longer or more."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2 * 2**30, before[1]))
    signal.alarm(60)
    yield
    signal.alarm(0)
    resource.setrlimit(resource.RLIMIT_AS, before)


def test_two_thousand_damaged_files_are_read_or_refused_in_one_line(tmp_path, bounded):
    rng, path, refused = random.Random(0), tmp_path / "fuzzed.pth", 0
    sources = {name: (FOLDER / name).read_bytes() for name in SEEDS}
    sources["deflated.pth"] = recompressed(sources["checkpoint.pth"], zipfile.ZIP_DEFLATED)
    export.write(tmp_path / "m.safetensors", torch_file.read(FOLDER / "zip.pth").arrays)
    sources["m.safetensors"] = (tmp_path / "m.safetensors").read_bytes()
    for number in range(2400):
        name = list(sources)[number % len(sources)]
        data = sources[name]
        if number % 3 and data[:2] == b"PK":
            data = inner(rng.choice(["data.pkl", "data.pkl", "byteorder", "0"]), data, rng)
        else:
            data = mutated(data, rng)
        path.write_bytes(data)
        try:
            found = torch_file.read(path)
            assert sum(array.nbytes for array in found.arrays.values()) <= torch_file.MOST_EXPANSION * len(data)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and str(error).startswith(str(path))
    assert 1000 < refused < 2400
