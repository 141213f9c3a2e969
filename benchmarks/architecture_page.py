"""The page docs/architectures.md: one row per architecture, one column per stage, and the reasons."""

from datetime import UTC, datetime
from importlib.metadata import version

PAGE = """# Architectures

Check whether tsdkd computes a model family correctly in every stage:

```bash
python benchmarks/architectures.py --markdown docs/architectures.md
```

The script makes a tiny random student and teacher of each architecture and runs every stage on a CPU in float32.
It compares the values with transformers and peft alone, which read one sequence at a time, without padding and drafts.
Dropout is 0. The table does not show whether distillation improves such a model.

| column | what is compared |
|---|---|
{columns}

*ok*: the values are equal. *refused*: tsdkd refuses the model, for the reason below the table. *not run*: the stage
needs an artifact that an earlier stage did not write.
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
        failed=f"*FAILED* ({failures}): values differ or the stage crashes, see below.\n" if failures else "",
        table="\n".join(lines),
        notes="".join(f"{i}. {note}\n" for i, note in enumerate(notes, 1)),
        date=f"{datetime.now(UTC):%Y-%m-%d}",
        versions=", ".join(f"{name} {version(name)}" for name in ("tsdkd", "torch", "transformers", "peft", "lm-eval")),
    )


def _short(cell: str, notes: list[str]) -> str:
    """A cell's first word with the number of its reason in `notes`; adds a new reason."""
    word, _, reason = cell.partition(": ")
    if not reason:
        return cell
    if reason not in notes:
        notes.append(reason)
    return f"{word} ({notes.index(reason) + 1})"
