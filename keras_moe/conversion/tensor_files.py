"""Tensors by name in the safetensors files of a checkpoint."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class TensorFiles:
    """A checkpoint of one file or of several, read one tensor at a time.

    Args:
        path: A `.safetensors` file, an index `.json` of several, or a folder with
            `model.safetensors.index.json` or `model.safetensors`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: `path` is none; a file is not what its name says.
        ImportError: safetensors is not installed.
    """

    def __init__(self, path: str | os.PathLike):
        if not isinstance(path, str | os.PathLike):
            raise ValueError(
                "`path` must be a path of a file or folder. Received: "
                f"path={path!r}. Pass a string."
            )
        self._path = _file_of(Path(path))
        self._open: dict[Path, Any] = {}
        if self._path.suffix == ".json":
            self._files = _indexed(self._path)
        else:
            self._files = dict.fromkeys(self._opened(self._path).keys(), self._path)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, which is not read.

        Raises:
            ValueError: There is no tensor of this name.
        """
        return tuple(self._holder(name).get_slice(name).get_shape())

    def verify(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises a `ValueError` unless there is a tensor of this name and shape."""
        if self.shape(name) != shape:
            raise ValueError(
                f"`path` must hold a tensor {name!r} of the shape {shape}. Received: "
                f"one of {self.shape(name)} in {self._path}. Is it another model, or "
                "another size?"
            )

    def read(self, name: str) -> np.ndarray:
        """A tensor, in the type it has in the file."""
        return self._holder(name).get_tensor(name)

    def _holder(self, name):
        if name not in self._files:
            there = sorted(self._files)
            listed = ", ".join(map(repr, there[:8])) + ", ..." * (len(there) > 8)
            raise ValueError(
                f"`path` must hold a tensor {name!r}. Received: {self._path} with "
                f"{len(there)} others: {listed}. Correct `block` or `prefix`."
            )
        return self._opened(self._files[name])

    def _opened(self, path):
        if path not in self._open:
            self._open[path] = _opened(path)
        return self._open[path]


def _file_of(path):
    if path.is_dir():
        for name in (_INDEX, _SINGLE):
            if (path / name).is_file():
                return path / name
        raise FileNotFoundError(
            f"`path` must hold {_INDEX} or {_SINGLE}. Received: path={str(path)!r} "
            "without either. Pass the file itself."
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"`path` must be a file or a folder that exists. Received: "
            f"path={str(path)!r}."
        )
    return path


def _indexed(path):
    try:
        places = json.loads(path.read_text())["weight_map"]
        return {name: path.parent / file for name, file in places.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            "`path` must be an index with a `weight_map` from names of tensors to "
            f"files. Received: {path}. Pass a .safetensors file or its folder."
        ) from error


def _opened(path):
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(
            "Reading published weights needs safetensors. Install keras-moe[weights]."
        ) from error
    _file_of(path)
    try:
        return safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"`path` must be a safetensors file. Received: {path}: {error}. Other "
            "formats must be converted first."
        ) from error
