"""Reading single tensors out of a folder of safetensors files.

Only the files that hold a wanted tensor are opened, and only the bytes of wanted tensors read.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from serving.config.model import read_json_object
from serving.errors import ModelError
from serving.weights.slots import Region

__all__ = ["Checkpoint", "TensorInfo"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_SERVED_DTYPES = {"F32", "BF16", "F16"}
_HEADER_LIMIT = 100_000_000
_AGAIN = "download it again"


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as its file's header describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int


class Checkpoint:
    """The safetensors files of one folder; a context manager that closes what it opened."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of = _locate(folder)
        self._headers: dict[Path, dict[str, TensorInfo]] = {}
        self._open: dict[Path, Any] = {}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def info(self, name: str) -> TensorInfo:
        """Shape, dtype and size of a tensor, checked against its file. Raises ModelError."""
        file = self._file_of.get(name)
        if file is None:
            raise ModelError(
                f"The weights in {self.folder} lack the tensor {name}; the checkpoint is "
                f"incomplete or config.json belongs to another model. {_AGAIN.capitalize()}."
            )
        if file not in self._headers:
            self._headers[file] = read_header(file)
        found = self._headers[file].get(name)
        if found is None:
            raise ModelError(f"{file} lacks the tensor {name} that {_INDEX} promises; {_AGAIN}.")
        if found.dtype not in _SERVED_DTYPES:
            raise ModelError(
                f"{file}: tensor {name} is stored as {found.dtype}, which is not supported; "
                "give the bfloat16 or float32 version of the model."
            )
        return found

    def read(self, name: str) -> Tensor:
        """One tensor, mapped from its file. Raises ModelError."""
        return self._read(name, lambda opened: opened.get_tensor(name))

    def read_region(self, name: str, region: Region) -> Tensor:
        """A part of a tensor that is not empty; only its bytes are read. Raises ModelError."""
        at = tuple(slice(part.start, part.stop) for part in region)
        return self._read(name, lambda opened: opened.get_slice(name)[at])

    def _read(self, name: str, what: Callable[[Any], Tensor]) -> Tensor:
        file = self.info(name).file
        try:
            if file not in self._open:
                self._open[file] = safe_open(str(file), framework="pt", device="cpu")
            return what(self._open[file])
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} cannot be read ({error}); {_AGAIN}.") from error


def _locate(folder: Path) -> dict[str, Path]:
    """Which file holds which tensor, from the index or from the single file's header."""
    index = folder / _INDEX
    if index.is_file():
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{index} holds no weight_map; {_AGAIN}.")
        files: dict[str, Path] = {}
        for name, file in weight_map.items():
            # A name with a folder in it could lead out of the checkpoint.
            if not isinstance(file, str) or Path(file).name != file:
                raise ModelError(f"{index} names the file {file!r}, which is not in its folder.")
            files[str(name)] = folder / file
        return files
    single = folder / _SINGLE
    if single.is_file():
        return dict.fromkeys(read_header(single), single)
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise ModelError(
            f"{folder} holds weights in PyTorch's pickle format only, which is not safe to load; "
            "give a checkpoint with *.safetensors files."
        )
    raise ModelError(
        f"{folder} holds no weights ({_SINGLE} or {_INDEX}); complete the download, or use "
        "--load-format dummy for random weights."
    )


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The header of a safetensors file: 8 bytes of length, then JSON; data follows.

    Raises ModelError when the file is missing, shorter than its header says, or not safetensors.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else _HEADER_LIMIT + 1
            if length > min(size - 8, _HEADER_LIMIT):
                raise ModelError(
                    f"{file} is truncated or not a safetensors file ({size} bytes); {_AGAIN}."
                )
            header = json.loads(stream.read(length))
    except FileNotFoundError as error:
        raise ModelError(f"The weight file {file} is missing; complete the download.") from error
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise ModelError(f"{file} has a broken header; {_AGAIN}.") from error
    tensors: dict[str, TensorInfo] = {}
    end = 0
    try:
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, stop = (int(offset) for offset in entry["data_offsets"])
            shape = tuple(int(n) for n in entry["shape"])
            tensors[name] = TensorInfo(file, shape, str(entry["dtype"]), stop - begin)
            end = max(end, stop)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{file} has a broken header; {_AGAIN}.") from error
    if 8 + length + end != size:
        raise ModelError(
            f"{file} has {size} bytes where its header promises {8 + length + end}; it is "
            f"truncated or damaged, {_AGAIN}."
        )
    return tensors
