"""Files that are there as a whole or not at all, and whether they can be written."""

import contextlib
import errno
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

#: How the name of a file begins while it is written.
PARTIAL = ".partial."


_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class NoRoomError(OSError):
    """A file was not written: the disk is full, or a quota or limit is reached."""


@contextlib.contextmanager
def written_beside(path: str | os.PathLike) -> Iterator[Path]:
    """A path beside `path` to write to, renamed to `path` when all has been written.

    Whoever is interrupted within leaves what stood at `path` before; so does a machine
    that loses its power.

    Args:
        path: Str or path of the file.

    Yields:
        Path in the same folder, with the same suffixes.

    Raises:
        NoRoomError: The disk is full.
    """
    path = Path(path)
    partial = path.with_name(PARTIAL + path.name)
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        number = _number_of(error)
        if number not in _NO_ROOM or isinstance(error, NoRoomError):
            raise
        raise _no_room(path, number) from error


def verify_room(path: str | os.PathLike, num_bytes: int) -> None:
    """Raises unless so many bytes can be written where `path` is; writes nothing.

    For libraries that a full disk leaves in disorder: HDF5 ends the process later.

    Args:
        path: Str or path of the file that is to be written.
        num_bytes: Int. At most so many.

    Raises:
        NoRoomError: They have no room.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    path = Path(path)
    with tempfile.TemporaryFile(dir=path.parent) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        except OSError as error:
            # Others say that this file system cannot tell.
            if error.errno in _NO_ROOM:
                whole = path.with_name(path.name.removeprefix(PARTIAL))
                raise _no_room(whole, error.errno, num_bytes) from error


def _number_of(error):
    """The error number of the system; HDF5 tells it in words only."""
    number = getattr(error, "errno", None)
    if number is None and isinstance(error, RuntimeError | OSError):
        match = re.search(r"errno = (\d+)", str(error))
        number = int(match[1]) if match else None
    return number


def _no_room(path, number, num_bytes=None):
    size = "" if num_bytes is None else f" (up to {num_bytes:,} bytes)"
    error = NoRoomError(
        f"{path} could not be written{size}: {os.strerror(number)}. Free some space on "
        "its disk. What stood there before is kept."
    )
    error.errno = number
    return error


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a UTF-8 file as a whole or not at all.

    Args:
        path: Str or path of the file.
        text: Str.
    """
    with written_beside(path) as partial:
        partial.write_text(text, encoding="utf-8")


def verify_folder(folder: str | os.PathLike, name: str) -> Path:
    """Makes a folder if it is missing, and checks that files can be written there.

    Args:
        folder: Where.
        name: Of the argument, for the message.

    Returns:
        The folder.

    Raises:
        ValueError: It can't be made, or not be written to.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"`{name}` must be a folder to write to, or one that can be made. "
            f"Received: {name}={str(folder)!r} ({error.strerror}). Choose another."
        ) from error
    return folder


def verify_picture(path: str | os.PathLike, name: str) -> Path:
    """Checks that matplotlib can write a picture there.

    Args:
        path: The picture. Its folder is made if it is missing.
        name: Of the argument, for the message.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The suffix is of no kind that matplotlib writes, the path is a
            folder, or its folder can't be written to.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise ImportError(
            "A picture of the experts needs matplotlib. Install keras-moe[examples], "
            f"or leave `{name}` out."
        ) from error
    path = Path(path)
    kinds = sorted(FigureCanvasBase.get_supported_filetypes())
    # To a name without a suffix matplotlib adds one.
    if (path.suffix and path.suffix[1:].lower() not in kinds) or path.is_dir():
        raise ValueError(
            f"`{name}` must be a file whose name ends in a kind that matplotlib "
            f"writes ({', '.join(kinds)}). Received: {name}={str(path)!r}. End it in "
            ".png."
        )
    verify_folder(path.parent, name)
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError(
            f"`{name}` must be a file that can be written. Received: "
            f"{name}={str(path)!r}, which is there and can't. Choose another."
        )
    return path
