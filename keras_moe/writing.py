"""Files that are there as a whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

#: How the name of a file begins while it is written.
PARTIAL = ".partial."


@contextlib.contextmanager
def written_beside(path: str | os.PathLike) -> Iterator[Path]:
    """A path beside `path` to write to, renamed to `path` when all has been written.

    Whoever is interrupted within leaves what stood at `path` before.

    Args:
        path: Str or path of the file.

    Yields:
        Path in the same folder, with the same suffixes.
    """
    path = Path(path)
    partial = path.with_name(PARTIAL + path.name)
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a UTF-8 file as a whole or not at all.

    Args:
        path: Str or path of the file.
        text: Str.
    """
    with written_beside(path) as partial:
        partial.write_text(text, encoding="utf-8")
