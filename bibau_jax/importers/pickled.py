"""The part of pickle that a PyTorch state dict needs, read without executing anything.

A pickle is a program. This one is interpreted here instead of by Python's unpickler: names stay names, a call makes nothing
but a note of what was called, and of those only what tensors and plain containers need is understood. Everything else is
refused by name.
"""

import pickletools
from typing import Any, NamedTuple

from bibau_jax.errors import UserError, shown

MOST_OPERATIONS = 2_000_000  # a state dict of a thousand tensors has about fifty thousand
MOST_DIMENSIONS = 16
MOST_BITS = 128  # of a number
LARGEST = 2**63  # size, stride or offset


class Name(NamedTuple):
    """A module's attribute that the pickle refers to; never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return shown(f"{self.module}.{self.name}")


class Inert(NamedTuple):
    """What stands for an object of a harmless class that is not a tensor, e.g. the settings of a training."""

    kind: Name


class Stored(NamedTuple):
    """A reference to a storage outside the pickle: its element type by PyTorch's name, its key and how many elements."""

    kind: str
    key: str
    size: int


class View(NamedTuple):
    """A tensor: a strided view of a storage. `kind` is the element type where the storage has none."""

    storage: Stored
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    kind: str = ""


# Classes that training scripts put beside the weights. They become `Inert`: none is imported, none is called.
HARMLESS = {
    Name("argparse", "Namespace"),
    Name("collections", "defaultdict"),
    Name("collections", "Counter"),
    Name("pathlib", "PosixPath"),
    Name("pathlib", "WindowsPath"),
    Name("pathlib", "Path"),
    Name("datetime", "datetime"),
    Name("datetime", "date"),
    Name("datetime", "timedelta"),
    Name("builtins", "dict"),
    Name("builtins", "list"),
    Name("builtins", "int"),
    Name("builtins", "float"),
    Name("__builtin__", "dict"),
    Name("__builtin__", "list"),
    Name("_codecs", "encode"),
    Name("numpy", "dtype"),
    Name("numpy", "ndarray"),
    *(Name(f"numpy.{core}.multiarray", made) for core in ("core", "_core") for made in ("scalar", "_reconstruct")),
    Name("torch", "device"),
    Name("torch._C", "_CudaDeviceProperties"),
}
DICTS = {Name("collections", "OrderedDict"), Name("builtins", "dict"), Name("__builtin__", "dict")}
TENSORS = {"_rebuild_tensor": 4, "_rebuild_tensor_v2": 6, "_rebuild_tensor_v3": 7}  # arguments that are needed
_MARK = object()


def refuse(what: str) -> UserError:
    """The error for a pickle that is not read."""
    return UserError(f"not read, for safety: {what}")


def load(file, storages: dict[str, Stored] | None = None) -> Any:
    """The object of one pickle at the file's position, which ends behind it.

    Plain containers, numbers and strings, `View` for tensors, `Inert` for harmless objects; of keys that are no strings only
    their types are kept. UserError for anything else, and for a pickle that is cut off, damaged, or endless. `file` must not
    give more than it holds, whatever it is asked for. `storages` is given every storage that it refers to.
    """
    machine = _Machine({} if storages is None else storages)
    try:
        for count, (operation, argument, _) in enumerate(pickletools.genops(file)):
            if count > MOST_OPERATIONS:
                raise refuse(f"the pickle has more than {MOST_OPERATIONS:,} operations")
            step = machine.operations.get(operation.name)
            if step is None:
                raise refuse(f"the pickle uses {operation.name}, which no state dict needs")
            step(argument)
    except UserError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, MemoryError, RecursionError) as error:
        raise UserError(f"the pickle is damaged or cut off ({type(error).__name__})") from None
    if len(machine.stack) != 1:
        raise UserError("the pickle is damaged or cut off")
    return machine.stack[0]


class _Machine:
    """The stack machine that pickles are written for, with nothing that could run."""

    def __init__(self, storages: dict[str, Stored]):
        self.stack, self.memo, self.copied, self.storages = [], {}, 0, storages
        push = self.stack.append
        constants = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
        plain = "BININT BININT1 BININT2 BINFLOAT FLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8 UNICODE"
        plain += " BINBYTES SHORT_BINBYTES BINBYTES8 BINSTRING SHORT_BINSTRING STRING"
        self.operations = {name: push for name in plain.split()}
        self.operations |= {name: self._number for name in ("LONG1", "LONG4", "INT", "LONG")}
        self.operations |= {name: lambda _, value=value: push(value) for name, value in constants.items()}
        self.operations |= {name: lambda _: None for name in ("PROTO", "FRAME", "STOP")}
        self.operations |= {
            "MARK": lambda _: push(_MARK),
            "POP": lambda _: self.stack.pop(),
            "POP_MARK": lambda _: self._marked(),
            "DUP": lambda _: push(self.stack[-1]),
            "EMPTY_DICT": lambda _: push({}),
            "EMPTY_LIST": lambda _: push([]),
            "EMPTY_TUPLE": lambda _: push(()),
            "EMPTY_SET": lambda _: push([]),
            "TUPLE": lambda _: push(tuple(self._marked())),
            "LIST": lambda _: push(self._marked()),
            "DICT": lambda _: push(_pairs({}, self._marked())),
            "TUPLE1": lambda _: self._tuple(1),
            "TUPLE2": lambda _: self._tuple(2),
            "TUPLE3": lambda _: self._tuple(3),
            "APPEND": lambda _: self._append([self.stack.pop()]),
            "APPENDS": lambda _: self._append(self._marked()),
            "ADDITEMS": lambda _: self._append(self._marked()),
            "SETITEM": lambda _: self._set(self._take(2)),
            "SETITEMS": lambda _: self._set(self._marked()),
            "BINPUT": self._remember,
            "LONG_BINPUT": self._remember,
            "PUT": self._remember,
            "MEMOIZE": lambda _: self._remember(len(self.memo)),
            "BINGET": lambda at: push(self.memo[at]),
            "LONG_BINGET": lambda at: push(self.memo[at]),
            "GET": lambda at: push(self.memo[at]),
            "GLOBAL": lambda text: push(_known(*text.split(" ", 1))),
            "STACK_GLOBAL": lambda _: push(_known(*self._take(2))),
            "REDUCE": lambda _: push(self._called(*self._take(2))),
            "NEWOBJ": lambda _: push(self._called(*self._take(2))),
            "BUILD": lambda _: self.stack.pop(),  # an object's state: what is inert stays inert
            "BINPERSID": lambda _: push(self._stored(self.stack.pop())),
        }

    def _number(self, value: int) -> None:
        if value.bit_length() > MOST_BITS:  # reckoning with such a one takes for ever
            raise refuse(f"the pickle has a number of {value.bit_length():,} bits")
        self.stack.append(value)

    def _stored(self, reference) -> Stored:
        found = _stored(reference)
        if self.storages.setdefault(found.key, found) != found:
            raise ValueError
        return found

    def _take(self, count: int) -> list:
        taken = self.stack[-count:]
        if len(taken) < count or any(value is _MARK for value in taken):
            raise ValueError
        del self.stack[-count:]
        return taken

    def _marked(self) -> list:
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:  # an IndexError where there is none
            at -= 1
            if at < 0:
                raise IndexError
        taken = self.stack[at + 1 :]
        del self.stack[at:]
        return taken

    def _tuple(self, count: int) -> None:
        self.stack.append(tuple(self._take(count)))

    def _append(self, values: list) -> None:
        target = self.stack[-1]
        if not isinstance(target, Inert):
            if not isinstance(target, list):
                raise TypeError
            target.extend(values)

    def _set(self, values: list) -> None:
        target = self.stack[-1]
        if not isinstance(target, Inert):
            if not isinstance(target, dict):
                raise TypeError
            _pairs(target, values)

    def _called(self, what, arguments):
        """What a call makes: a tensor's description, a plain container, or nothing that could do anything."""
        if not isinstance(what, Name) or not isinstance(arguments, tuple):
            raise TypeError
        if what in DICTS:
            pairs = arguments[0] if arguments else []
            self.copied += len(pairs)
            if self.copied > MOST_OPERATIONS:  # a few calls may copy the same long list again and again
                raise refuse("the pickle copies without end")
            return _pairs({}, [part for pair in pairs for part in _pair(pair)])
        if what == Name("torch", "Size"):
            return _whole(arguments[0])
        if what.module == "torch._utils" and what.name in TENSORS:
            if len(arguments) < TENSORS[what.name] or not isinstance(arguments[0], Stored):
                raise TypeError
            kind = arguments[6].name if what.name.endswith("v3") and isinstance(arguments[6], Name) else ""
            (offset,) = _whole((arguments[1],))
            return View(arguments[0], offset, _whole(arguments[2]), _whole(arguments[3]), kind)
        if what.module == "torch._utils":
            if not isinstance(arguments[0], View):
                raise TypeError
            return arguments[0]
        return Inert(what)

    def _remember(self, at: int) -> None:
        value = self.stack[-1]
        if value is _MARK:
            raise ValueError
        self.memo[at] = value


def _pairs(target: dict, values: list) -> dict:
    if len(values) % 2:
        raise ValueError
    for key, value in zip(values[::2], values[1::2], strict=True):
        # What is no string is of no use as a name, and is kept from being hashed: numbers can be chosen that collide.
        target[key if isinstance(key, str) else type(key)] = value
    return target


def _known(module, name) -> Name:
    """A name that may be referred to; all others are refused at once, called or not."""
    if not isinstance(module, str) or not isinstance(name, str):
        raise TypeError
    found = Name(module, name)
    torch = module == "torch" or module.startswith("torch.")
    fits = found in HARMLESS or found in DICTS
    fits |= module == "torch._utils" and name in (*TENSORS, "_rebuild_parameter", "_rebuild_parameter_with_state")
    fits |= module == "torch" and (name.endswith("Storage") or name == "Size" or name in KINDS)
    fits |= module in ("torch.storage", "torch.cuda") and name.endswith("Storage")
    if fits:
        return found
    if torch and (module.startswith("torch.nn") or module.startswith("torch.jit")) or "Parallel" in name:
        raise refuse(f"it holds a whole pickled model ({found}) and not its weights; {RESAVE}")
    raise refuse(f"the pickle refers to {found}, which no state dict needs; if you trust where it is from, {RESAVE}")


RESAVE = "load it where it was made and save torch.save(model.state_dict(), path)"
# Element types by PyTorch's names, of storages ("FloatStorage") and of `torch.float32`.
KINDS = {
    "float32": "f4",
    "float64": "f8",
    "float16": "f2",
    "bfloat16": "bfloat16",
    "int64": "i8",
    "int32": "i4",
    "int16": "i2",
    "int8": "i1",
    "uint8": "u1",
    "bool": "?",
}
STORAGES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "",
}


def _pair(value) -> tuple:
    key, value = value
    return key, value


def _whole(values) -> tuple[int, ...]:
    """A short tuple of numbers from 0 on; anything else raises."""
    if not isinstance(values, tuple | list) or len(values) > MOST_DIMENSIONS:
        raise ValueError
    if any(type(v) is not int or not 0 <= v < LARGEST for v in values):
        raise ValueError
    return tuple(values)


def _stored(reference) -> Stored:
    if not isinstance(reference, tuple) or len(reference) < 5 or reference[0] != "storage":
        raise refuse("the pickle refers to something outside itself that is no storage")
    kind, key, size = reference[1], reference[2], reference[4]
    if not isinstance(kind, Name) or not isinstance(key, str):
        raise ValueError
    if kind.name not in STORAGES:
        raise UserError(f'tensors of type "{kind}" cannot be read')
    (size,) = _whole((size,))
    if len(reference) > 5 and reference[5] is not None:
        raise refuse("its storages are views of others, as versions of PyTorch before 0.4 wrote them")
    return Stored(STORAGES[kind.name], key, size)
