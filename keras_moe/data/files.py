"""Lines of text files, plain or compressed."""

import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from importlib import resources
from typing import Any

_OPENERS: dict[str, Callable] = {"": open, ".gz": gzip.open, ".xz": lzma.open}


def suffixes(kind: str) -> list[str]:
    """`".txt"` -> `[".txt", ".txt.gz", ".txt.xz"]`: what `read_lines` can read."""
    return [kind + compressed for compressed in _OPENERS]


def read_lines(path: Any) -> Iterator[str]:
    """Lines of a UTF-8 file, with their line ends.

    Args:
        path: Path, also of a resource of a package. `.gz` and `.xz` at its end
            say how it is compressed.

    Yields:
        Str. A byte order mark at the beginning is left out.

    Raises:
        ValueError: The file is not UTF-8 or is damaged.
    """
    opener = next(o for s, o in reversed(_OPENERS.items()) if path.name.endswith(s))
    number = 0
    try:
        with resources.as_file(path) as real, opener(real, "rb") as file:
            for number, raw in enumerate(file, 1):
                # Some editors begin a file with a byte order mark.
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"A corpus must be UTF-8. Received: {path}, line {number}: {error}. "
            "Convert the file first."
        ) from error
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise ValueError(
            f"{path} could not be read after line {number}: {error}. The file is "
            "damaged or not in the format its name says; make it again."
        ) from error
