"""What both engines say."""

from collections.abc import Iterable, Sequence

KEEP_XLA_OFF = 'leave it "auto" or set it False'


def as_table(rows: Sequence[Sequence[str]], notes: Iterable[str] = ()) -> str:
    """Rows of cells in columns of equal width, the head first, and lines below."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in [*lines, *notes])


def other_scope(received: str) -> ValueError:
    """The error of a layer that runs under another strategy than it was built under.

    Args:
        received: What was built where, and runs where.
    """
    return ValueError(
        "A layer must run under the strategy in whose scope it was built. Received: "
        f"{received}. Build the model again within `with strategy.scope():` of that "
        "strategy, and load its weights there."
    )


def does_not_work(name: str, value: object, model: str, where: str, remedy: str):
    """The error of a setting of `compile` that an engine cannot have."""
    return ValueError(
        f"`{name}` of `compile` does not work {where}. Received: {name}={value!r} for "
        f"{model!r}; {remedy}."
    )
