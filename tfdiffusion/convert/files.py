"""Reading and writing files of tensors, with NumPy alone.

Two formats hold published weights. A safetensors file is a length, a JSON header that names each
tensor with its type, shape and place, and the bytes. A PyTorch file (`.bin`, `.pth`) is a zip of
raw storages and one pickle that says how to cut tensors out of them; a pickle is a program, so this
one runs in an interpreter that knows nothing but the few words such a file is made of.
"""

from __future__ import annotations

import collections
import json
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tfdiffusion import _checks

Tensors = Mapping[str, np.ndarray]

NAME = "diffusion_pytorch_model"
_TYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}
_MAX_HEADER = 100_000_000  # bytes, as in the format's own library


# ------------------------------------------------------------------------------------ safetensors


def read_safetensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads a safetensors file.

    Args:
        path: of the file, which is mapped into memory and read when a tensor is.

    Returns:
        Arrays by name, read-only; bfloat16 comes as float32.

    Raises:
        ValueError: If the file is incomplete or damaged, or has a type that NumPy does not.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise _damaged(path, f"its header of {length} bytes does not fit into {size}")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise _damaged(path, f"its header is no JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is no JSON object")
    header.pop("__metadata__", None)
    start = 8 + length
    data = (
        np.memmap(path, mode="r", dtype="u1", offset=start) if size > start else np.zeros(0, "u1")
    )
    return {name: _cut(path, name, entry, data) for name, entry in header.items()}


def _cut(path: Path, name: str, entry: Any, data: np.ndarray) -> np.ndarray:
    try:
        kind, shape = entry["dtype"], tuple(int(side) for side in entry["shape"])
        begin, end = (int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"the header says nothing useful of {name!r}") from error
    if kind not in _TYPES and kind != "BF16":
        raise ValueError(f"{str(path)!r}: {name!r} has the type {kind}, which cannot be read.")
    dtype = np.dtype("<u2" if kind == "BF16" else _TYPES[kind])
    if (
        not 0 <= begin <= end <= data.size
        or min(shape, default=0) < 0
        or end - begin != math.prod(shape) * dtype.itemsize
    ):
        raise _damaged(path, f"{name!r} of shape {shape} does not lie in its {data.size} bytes")
    array = data[begin:end].view(dtype).reshape(shape)
    return _from_bfloat16(array) if kind == "BF16" else array


def _from_bfloat16(array: np.ndarray) -> np.ndarray:
    """The upper half of a float32 is what a bfloat16 is."""
    return (array.astype("<u4") << 16).view("<f4")


def write_safetensors(path: str | os.PathLike, tensors: Tensors) -> None:
    """Writes float32 arrays as a safetensors file that PyTorch's projects read.

    Args:
        path: of the file.
        tensors: arrays by name.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + 4 * tensor.size
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of eight
    with Path(path).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor, "<f4").tobytes())
        file.flush()
        os.fsync(file.fileno())


# ---------------------------------------------------------------------------------- PyTorch files

_STORAGES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "BFloat16Storage": None,  # NumPy has no such type
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}


def read_pytorch(path: str | os.PathLike) -> Any:
    """Reads what `torch.save` wrote, without PyTorch and without running anything of the file.

    Args:
        path: of a `.bin`, `.pt` or `.pth` file.

    Returns:
        What was saved: dicts, lists, numbers, texts; tensors are read-only arrays.

    Raises:
        ValueError: If the file is damaged, is of PyTorch before 1.6, or wants anything but tensors.
    """
    path = Path(path)
    try:
        archive = zipfile.ZipFile(path)
    except OSError:
        raise
    except Exception as error:  # no zip at all, or one of no known version or encoding
        raise ValueError(
            f"{str(path)!r} is no PyTorch file of version 1.6 or later, or it is incomplete. An "
            "older one that you trust can be saved again by a newer PyTorch."
        ) from error
    with archive:
        pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"{str(path)!r} is a zip, but none that torch.save wrote.")
        try:
            with archive.open(pickles[0]) as file:
                return _Unpickler(file, archive, pickles[0].removesuffix("data.pkl")).load()
        except Exception as error:  # what is damaged fails in as many ways as there are opcodes
            reason = str(error) or type(error).__name__
            raise ValueError(f"{str(path)!r} cannot be read: {reason}") from error


class _Unpickler(pickle.Unpickler):
    """Knows the words of a file of tensors, and no other: a pickle can call only what it finds."""

    def __init__(self, file, archive: zipfile.ZipFile, folder: str):
        super().__init__(file)
        self._archive, self._folder = archive, folder
        order = f"{folder}byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise ValueError("it was written on a big-endian machine.")
        self._loaded: dict[str, np.ndarray] = {}
        # Made anew for each file, so that nothing a file does to them outlives it.
        self._words: dict[tuple[str, str], Callable] = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): lambda *arguments: _view(*arguments[:4]),
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        }

    def find_class(self, module: str, name: str):
        if module == "torch" and name in _STORAGES:
            return name
        if (module, name) in self._words:
            return self._words[module, name]
        raise pickle.UnpicklingError(
            f"it wants {module}.{name}, and only tensors in dicts and lists are read."
        )

    def persistent_load(self, reference) -> np.ndarray:
        """A storage, by the name of its entry in the zip."""
        what, kind, key, _, _ = reference
        if what != "storage" or kind not in _STORAGES:
            raise pickle.UnpicklingError(f"it refers to {what!r} of type {kind!r}.")
        if key not in self._loaded:
            info = self._archive.getinfo(f"{self._folder}data/{key}")
            if info.compress_type != zipfile.ZIP_STORED:
                raise pickle.UnpicklingError("its storages are compressed, as PyTorch's never are.")
            data, dtype = self._archive.read(info), _STORAGES[kind]
            bfloat16 = dtype is None
            array = np.frombuffer(data, "<u2" if bfloat16 else dtype)
            self._loaded[key] = _from_bfloat16(array) if bfloat16 else array
        return self._loaded[key]


def _view(storage: np.ndarray, offset: int, shape: tuple, strides: tuple) -> np.ndarray:
    """A tensor that lies in a storage, with strides in elements."""
    last = offset + sum((side - 1) * stride for side, stride in zip(shape, strides))
    if (
        not isinstance(storage, np.ndarray)
        or len(shape) != len(strides)
        or min((offset, *shape, *strides)) < 0
        or (math.prod(shape) and last >= storage.size)
    ):
        raise pickle.UnpicklingError(f"a tensor of shape {shape} does not lie in its storage.")
    steps = [stride * storage.itemsize for stride in strides]
    if not math.prod(shape):
        return np.zeros(shape, storage.dtype)
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps, writeable=False)


# ---------------------------------------------------------------------------------------- folders


def locate(path: str | os.PathLike) -> Path:
    """The folder of a checkpoint, fetched from the Hugging Face Hub if it is a name there.

    Args:
        path: a folder, or "owner/name" of a repository.

    Raises:
        FileNotFoundError: If there is neither.
        NotADirectoryError: If it is a file.
        ImportError: If it is a name, and `huggingface_hub` is not installed.
        OSError: If the hub cannot be reached, or has no such repository.
    """
    folder = _checks.path("path", path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(
            f"{str(path)!r} is a file. Pass the folder that it lies in, with its config.json."
        )
    name = os.fspath(path)
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise FileNotFoundError(
            f"There is no folder {name!r}, and names on the hub look like 'owner/name'."
        )
    return _download(name)


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            f"There is no folder {name!r}. To fetch it from the Hugging Face Hub, install "
            "huggingface_hub: pip install 'tfdiffusion[convert]'"
        ) from error
    wanted = [f"{folder}{file}" for folder in ("", "unet/", "scheduler/") for file in _PATTERNS]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (OSError, ValueError) as error:  # its errors of HTTP and of names are among these
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OSError(
            f"There is no folder {name!r}, and it cannot be fetched from the Hugging Face Hub: "
            f"{reason}"
        ) from error


_PATTERNS = ("*.json", f"{NAME}*.safetensors", f"{NAME}*.bin")


def read_json(path: Path) -> dict:
    """A JSON object from a file.

    Raises:
        ValueError: If it is something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise _damaged(path, f"it is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise _damaged(path, f"it is no JSON object, but a {type(value).__name__}")
    return value


def read_weights(folder: Path) -> tuple[dict[str, np.ndarray], Path]:
    """The tensors of a model's folder: one safetensors file, its shards, or a `.bin`.

    Returns:
        Arrays by name, and the file that they are from (of shards: the index).

    Raises:
        FileNotFoundError: If there are no weights, or a shard is not there.
        ValueError: If a file is damaged.
    """
    for suffix, read in ((".safetensors", read_safetensors), (".bin", _read_state)):
        index = folder / f"{NAME}{suffix}.index.json"
        if (folder / f"{NAME}{suffix}").is_file():
            return read(folder / f"{NAME}{suffix}"), folder / f"{NAME}{suffix}"
        if index.is_file():
            return _read_shards(index, read), index
        variants = sorted(folder.glob(f"{NAME}.*{suffix}"))
        if len(variants) == 1:  # .fp16., or what else there is
            return read(variants[0]), variants[0]
    held = sorted(file.name for file in folder.iterdir())
    raise FileNotFoundError(
        f"{str(folder)!r} has no {NAME}.safetensors and no {NAME}.bin. It has: "
        f"{', '.join(held[:10]) or 'nothing'}{', ...' if len(held) > 10 else ''}."
    )


def _read_state(path: Path) -> dict[str, np.ndarray]:
    state = read_pytorch(path)
    if not isinstance(state, dict) or not all(isinstance(t, np.ndarray) for t in state.values()):
        raise ValueError(f"{str(path)!r} holds something else than named tensors.")
    return dict(state)


def _read_shards(index: Path, read: Callable) -> dict[str, np.ndarray]:
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise _damaged(index, "it has no weight_map of files")
    tensors: dict[str, np.ndarray] = {}
    for name in sorted(set(files.values())):
        path = index.parent / name
        if Path(name).name != name or not path.is_file():
            raise FileNotFoundError(f"{str(index)!r} names the file {name!r}, which is not there.")
        tensors |= read(path)
    missing = sorted(set(files) - set(tensors))
    if missing:
        raise _damaged(index, f"{len(missing)} of its tensors are in no file: {missing[:10]}")
    return tensors


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(f"{str(path)!r} is damaged or incomplete: {why}.")
