"""Tables of the guides, which tests compare with what running their cells gives."""

from pathlib import Path

GUIDES = Path(__file__).parent.parent.parent / "docs" / "guides"


def documented(guide: str, first: str) -> list[dict[str, str]]:
    """Rows of the table of a guide whose head begins so, as dicts by column."""
    lines = (GUIDES / guide).read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(first))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    head, _, *body = rows
    return [dict(zip(head, row, strict=True)) for row in body]
