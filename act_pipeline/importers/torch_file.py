"""Reading of PyTorch checkpoints (``torch.save``, zip format) without PyTorch, and without running code of the file.

The zip holds one pickle, ``data.pkl``, and the bytes of each storage. A pickle is a program that may call anything, so
Python's unpickler is not used: :func:`read_pickle` knows the instructions that ``torch.save`` writes, and four names
that they may call. The tensors' bytes are read only when they are wanted.
"""

from __future__ import annotations

import math
import os
import pickletools
import re
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import numpy as np

from act_pipeline.core.errors import UserError

_MAX_PICKLE_BYTES = 64 << 20
_MAX_DIMENSIONS = 8
_STORAGES = {
    "DoubleStorage": "<f8", "FloatStorage": "<f4", "HalfStorage": "<f2", "BFloat16Storage": "bfloat16",
    "LongStorage": "<i8", "IntStorage": "<i4", "ShortStorage": "<i2", "CharStorage": "i1", "ByteStorage": "u1",
    "BoolStorage": "?",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING")
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_SAVE_WEIGHTS = 'torch.save({"model": model.state_dict()}, FILE)'


class Storage(NamedTuple):
    """The bytes of one or several tensors.

    Attributes:
        dtype: NumPy's name, or ``bfloat16``.
        key: name of its file in the zip.
        values: number of values.
    """

    dtype: str
    key: str
    values: int


class StoredTensor(NamedTuple):
    """A tensor whose values are not read yet.

    Attributes:
        storage: where they are.
        offset: index of the first value in the storage.
        shape, stride: as PyTorch has them, in values.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class ForbiddenPickle(Exception):
    """A pickle has an instruction or a name that weights do not need."""


def read_pickle(data: bytes) -> Any:
    """Read a pickle that holds nothing but dicts, lists, tuples, numbers, text and PyTorch's tensors.

    Args:
        data: the pickle.

    Returns:
        what was pickled, with a :class:`StoredTensor` for each tensor.

    Raises:
        ForbiddenPickle: it holds something else.
        ValueError, TypeError, IndexError, KeyError, AttributeError: it is damaged.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    for opcode, given, _ in pickletools.genops(data):
        name, argument = opcode.name, cast(Any, given)
        if name == "STOP":
            return stack.pop()
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _VALUES:
            stack.append(argument)
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            items = _cut(stack, len(stack) - _TUPLES[name])
            stack.append(tuple(items))
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "TUPLE":
            items = _cut(stack, marks.pop())
            stack.append(tuple(items))
        elif name in ("APPEND", "APPENDS"):
            items = _cut(stack, marks.pop() if name == "APPENDS" else len(stack) - 1)
            _top(stack, list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = _cut(stack, marks.pop() if name == "SETITEMS" else len(stack) - 2)
            _set_items(_top(stack, dict), items)
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "GLOBAL":
            stack.append(_named(argument))
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif name == "REDUCE":
            function, arguments = _cut(stack, len(stack) - 2)
            if function not in _FUNCTIONS.values() or not isinstance(arguments, tuple):
                raise TypeError("it calls what is no function")
            stack.append(function(*arguments))
        elif name == "BUILD":  # attributes of an OrderedDict: PyTorch's `_metadata`
            stack.pop()
            _top(stack, dict)
        elif name != "PROTO":
            raise ForbiddenPickle(f"the instruction {name}")
    raise ValueError("it does not end")


def _cut(stack: list[Any], start: int) -> list[Any]:
    if start < 0:
        raise IndexError("it takes more than there is")
    items = stack[start:]
    del stack[start:]
    return items


def _top(stack: list[Any], kind: type) -> Any:
    if not isinstance(stack[-1], kind):
        raise TypeError(f"it fills a {type(stack[-1]).__name__}, expected a {kind.__name__}")
    return stack[-1]


def _set_items(target: dict[Any, Any], items: list[Any]) -> None:
    for key, value in zip(items[::2], items[1::2]):
        if not isinstance(key, (str, int, float)):
            raise TypeError(f"a key is {type(key).__name__}")
        target[key] = value


def _named(argument: str) -> Any:
    """Return what a name of the pickle, ``module name``, stands for."""
    module, _, name = argument.partition(" ")
    if module == "torch" and name in _STORAGES:
        return _STORAGES[name]
    if argument not in _FUNCTIONS:
        raise ForbiddenPickle(f"{module}.{name}"[:120])
    return _FUNCTIONS[argument]


def _storage(pid: Any) -> Storage:
    kind, dtype, key, _, count = pid
    if kind != "storage" or dtype not in _STORAGES.values() or not _are_counts((count,)):
        raise ValueError("a storage is not as PyTorch writes it")
    if not isinstance(key, str) or not re.fullmatch(r"\d{1,9}", key):
        raise ValueError("a storage has no number")
    return Storage(dtype, key, count)


def _make_dict(*arguments: Any) -> dict[Any, Any]:
    """Stand for ``OrderedDict`` and ``Counter``, which are made empty or of a dict."""
    if len(arguments) > 1 or not all(isinstance(argument, dict) for argument in arguments):
        raise TypeError("a dict is made of something else")
    return dict(*arguments)


def _make_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> StoredTensor:
    """Stand for ``torch._utils._rebuild_tensor_v2``."""
    if not (isinstance(storage, Storage) and _are_counts((offset,)) and _are_counts(shape) and _are_counts(stride)):
        raise ValueError("a tensor has no storage, offset, shape or stride")
    if len(shape) != len(stride) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"a tensor has {len(shape)} dimensions and {len(stride)} strides")
    values, last = math.prod(shape), offset + sum((length - 1) * step for length, step in zip(shape, stride))
    if values > storage.values or (values and last >= storage.values):
        raise ValueError(f"a tensor of shape {list(shape)} goes beyond the {storage.values} values of its storage")
    return StoredTensor(storage, offset, shape, stride)


def _make_parameter(tensor: Any, *_: Any) -> Any:
    """Stand for ``torch._utils._rebuild_parameter``."""
    return tensor


def _are_counts(values: Any) -> bool:
    return isinstance(values, tuple) and all(type(value) is int and 0 <= value < 1 << 48 for value in values)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": _make_dict,
    "collections Counter": _make_dict,
    "torch._utils _rebuild_tensor_v2": _make_tensor,
    "torch._utils _rebuild_parameter": _make_parameter,
}


class TorchFile:
    """A checkpoint that is open for reading; a context manager.

    Attributes:
        path: the file.
        content: what was saved; dicts, lists, tuples, numbers, strings, and :class:`StoredTensor` for each tensor.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open a file and read its structure.

        Raises:
            UserError: it is no checkpoint of PyTorch's zip format, is damaged, or holds more than weights and numbers.
        """
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); expected a .pth of PyTorch") from None
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise UserError(
                f"{path} is no checkpoint in PyTorch's zip format ({error}); if an older PyTorch wrote it, save the "
                f"weights again with 1.6 or later: {_SAVE_WEIGHTS}"
            ) from None
        try:
            self._root = self._find_root()
            self.content = self._unpickle()
        except BaseException:
            self._zip.close()
            raise

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def read(self, tensor: StoredTensor) -> np.ndarray:
        """Return a tensor's values as float32.

        Raises:
            UserError: its bytes are missing, or not as many as its storage has, or it holds no floating-point numbers.
        """
        storage = tensor.storage
        is_bfloat16 = storage.dtype == "bfloat16"
        dtype = np.dtype("<u2" if is_bfloat16 else storage.dtype)
        if not is_bfloat16 and dtype.kind != "f":
            raise UserError(f"{self.path}: a weight holds {dtype}, expected floating-point numbers")
        values = np.frombuffer(self._member(f"data/{storage.key}", storage.values * dtype.itemsize), dtype)
        view = np.lib.stride_tricks.as_strided(
            values[tensor.offset :], tensor.shape, [step * dtype.itemsize for step in tensor.stride]
        )
        if is_bfloat16:  # the upper half of a float32
            return (view.astype(np.uint32) << 16).view(np.float32)
        return view.astype(np.float32)

    def _find_root(self) -> str:
        roots = [name[: -len("data.pkl")] for name in self._zip.namelist() if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(roots) != 1:
            raise UserError(
                f"{self.path} is a zip with {len(roots)} files data.pkl, expected one, as torch.save writes it"
            )
        self._root = roots[0]
        if f"{self._root}byteorder" in self._zip.namelist() and self._member("byteorder") != b"little":
            raise UserError(f"{self.path} was written on a big-endian machine; save it again on a little-endian one")
        return self._root

    def _member(self, name: str, expected_bytes: int | None = None) -> bytes:
        """Return the bytes of a file of the zip; torch.save does not compress, so they are no more than the zip's."""
        try:
            info = self._zip.getinfo(f"{self._root}{name}")
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise ValueError("it is compressed")
            if expected_bytes is None and info.file_size > _MAX_PICKLE_BYTES:
                raise ValueError(f"it has {info.file_size} bytes")
            if expected_bytes is not None and info.file_size != expected_bytes:
                raise ValueError(f"it has {info.file_size} bytes, expected {expected_bytes}")
            content = self._zip.read(info)
        except (
            KeyError,
            ValueError,
            OSError,
            EOFError,
            RuntimeError,
            NotImplementedError,
            zipfile.BadZipFile,
        ) as error:
            raise UserError(
                f"{self.path}: {name} in the zip is not as torch.save writes it ({error}); download it again"
            ) from None
        if len(content) != info.file_size:
            raise UserError(f"{self.path}: {name} in the zip is cut off; download it again")
        return content

    def _unpickle(self) -> Any:
        try:
            return read_pickle(self._member("data.pkl"))
        except ForbiddenPickle as error:
            raise UserError(
                f"{self.path} holds {error}, expected weights, numbers and text only; a pickle can run code when it is "
                f"loaded, so this one is not; if you trust it, save the weights alone: {_SAVE_WEIGHTS}"
            ) from None
        except (ValueError, TypeError, AttributeError, KeyError, IndexError, OverflowError) as error:
            raise UserError(f"{self.path}: its data.pkl is damaged ({error}); download it again") from None
