"""The page docs/architectures.md: one row per architecture, one column per stage, and the reasons below."""

from datetime import UTC, datetime
from importlib.metadata import version

PAGE = """# Architectures

Look here whether a family of models runs through all stages:

```bash
python benchmarks/architectures.py --markdown docs/architectures.md
```

The script makes a tiny random student and teacher of each architecture, runs every stage on a CPU in float32, and
compares its values with plain transformers and peft, which read one sequence at a time without padding, drafts or
tsdkd. Dropout is 0. It shows that an architecture is computed correctly, not that its distillation pays.

| column | what is compared |
|---|---|
{columns}

*ok*: equal. *refused*: the stage ends with the reason below the table. *not run*: an earlier stage was refused.
{failed}
{table}

{notes}
Made on {date} with {versions}.
"""


def page(rows: dict[str, dict[str, str]], descriptions: dict[str, str]) -> str:
    """`rows`: cells by column, by architecture; `descriptions`: what each column compares."""
    notes: list[str] = []
    lines = [f"| architecture | {' | '.join(descriptions)} |", "|---" * (len(descriptions) + 1) + "|"]
    for architecture, cells in rows.items():
        shown = [_short(cells[column], notes) for column in descriptions]
        lines.append(f"| {architecture} | {' | '.join(shown)} |")
    failures = sum(cell.startswith("FAILED") for cells in rows.values() for cell in cells.values())
    return PAGE.format(
        columns="\n".join(f"| {column} | {text} |" for column, text in descriptions.items()),
        failed=f"*FAILED*: {failures} cells differ or crash; the error is below the table.\n" if failures else "",
        table="\n".join(lines),
        notes="".join(f"{i}. {note}\n" for i, note in enumerate(notes, 1)),
        date=f"{datetime.now(UTC):%Y-%m-%d}",
        versions=", ".join(f"{name} {version(name)}" for name in ("tsdkd", "torch", "transformers", "peft", "lm-eval")),
    )


def _short(cell: str, notes: list[str]) -> str:
    """A cell's first word with the number of its reason, which is added to the notes."""
    word, _, reason = cell.partition(": ")
    if not reason:
        return cell
    if reason not in notes:
        notes.append(reason)
    return f"{word} ({notes.index(reason) + 1})"
