"""Prompts that contain a benchmark's question, by n-grams of words."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tsdkd.errors import InputError
from tsdkd.stages.data.messages import Messages
from tsdkd.stages.data.prompt_files import READERS
from tsdkd.stages.data.prompts import Prompt
from tsdkd.stages.doctor.findings import Finding, finding
from tsdkd.stages.results.benchmarks import BENCHMARKS

NGRAM = 13
"""Words, as GPT-3 (Brown et al. 2020) and lm-eval compare training data with benchmarks."""
SHORTEST = 5
"""Words. Shorter questions, such as "not True and False", also occur in unrelated prompts."""
LISTED = 20
"""Prompts that the finding lists."""


@dataclass(frozen=True, slots=True)
class Question:
    benchmark: str
    text: str


@dataclass(frozen=True, slots=True)
class Overlap:
    """A prompt, and the question of which it contains the largest fraction."""

    location: str
    prompt_id: str
    benchmark: str
    question: str
    fraction: float
    """Fraction of the question's n-grams that the prompt contains; 1: the whole question."""


class QuestionIndex:
    """The n-grams of questions. Words are lower-case letters and digits."""

    def __init__(self, questions: list[Question]) -> None:
        grams = [_ngrams(words) if len(words := _words(q.text)) >= SHORTEST else set() for q in questions]
        self.questions = [question for question, own in zip(questions, grams, strict=True) if own]
        self.uncompared = len(questions) - len(self.questions)
        grams = [own for own in grams if own]
        self._counts = np.array([len(own) for own in grams])
        hashes = np.fromiter((gram for own in grams for gram in own), np.int64)
        owners = np.repeat(np.arange(len(grams)), self._counts) if grams else np.empty(0, np.int64)
        order = hashes.argsort(kind="stable")
        self._hashes, self._owners = hashes[order], owners[order]
        self._lengths = sorted({min(NGRAM, len(_words(question.text))) for question in self.questions})

    def find(self, prompt: Prompt) -> Overlap | None:
        """The question with the largest fraction of its n-grams in the prompt; None if no n-gram is there."""
        words = _words(_text(prompt.messages))
        grams = np.fromiter({gram for n in self._lengths for gram in _ngrams(words, n)}, np.int64)
        first, last = (np.searchsorted(self._hashes, grams, side) for side in ("left", "right"))
        found = [self._owners[a:b] for a, b in zip(first, last, strict=True) if b > a]
        if not found:
            return None
        owners, counts = np.unique(np.concatenate(found), return_counts=True)
        fractions = counts / self._counts[owners]
        best = int(fractions.argmax())
        question = self.questions[owners[best]]
        return Overlap(prompt.location, prompt.prompt_id, question.benchmark, question.text, float(fractions[best]))


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _ngrams(words: list[str], n: int = NGRAM) -> set[int]:
    """Hashes of the n-grams of some words; of all words together if they are fewer."""
    n = min(n, len(words))
    return {hash(tuple(words[i : i + n])) for i in range(len(words) - n + 1)} if n else set()


def _text(messages: Messages) -> str:
    contents = [part for m in messages for part in (m["content"] if isinstance(m["content"], list) else [m["content"]])]
    return "\n".join(str(part.get("text") or "") if isinstance(part, dict) else str(part or "") for part in contents)


def read_questions(directory: Path) -> list[Question]:
    """The questions of the splits that `eval --data` evaluates, without repeated ones.

    Datasets lie below `directory` in their hub layout: a card names the files of each split, else their names do.
    Raises InputError without any dataset, and for one that cannot be read.
    """
    sources = {
        (benchmark.dataset, split): benchmark.question
        for benchmark in BENCHMARKS.values()
        for split in benchmark.split.split(", ")
        if benchmark.local_dataset(directory) and (directory / benchmark.dataset).is_dir()
    }
    if not sources:
        known = ", ".join(dict.fromkeys(b.dataset for b in BENCHMARKS.values() if b.dataset))
        raise InputError(f"{directory} holds no benchmark.", f"Name a directory with some of: {known}.")
    questions: dict[Question, None] = {}
    for (dataset, split), column in sources.items():
        for file in _split_files(directory / dataset, split):
            for location, row in READERS[file.suffix.lower()](file, (column,)):
                if column not in row:
                    raise InputError(
                        f"{location}: no column {column!r}.", f"Copy the dataset {dataset} from the hub again."
                    )
                questions[Question(dataset, str(row[column] or ""))] = None
    for dataset in {dataset for dataset, _ in sources} - {question.benchmark for question in questions}:
        raise InputError(
            f"{directory / dataset} has no question in a file of its evaluated split.",
            "Copy the dataset from the hub again.",
        )
    return list(questions)


def _split_files(directory: Path, split: str) -> list[Path]:
    """The files of a split in every configuration of a dataset."""
    patterns = list(_patterns(directory / "README.md", split))
    if patterns:
        files = {file for pattern in patterns for file in directory.glob(pattern)}
    else:
        named = re.compile(rf"(^|[\W_]){re.escape(split)}([\W_]|$)")
        files = {file for file in directory.rglob("*") if named.search(str(file.relative_to(directory)))}
    return sorted(file for file in files if file.suffix.lower() in READERS)


def _patterns(card: Path, split: str) -> Iterator[str]:
    """The file patterns that a dataset's card gives for a split."""
    parts = card.read_text(encoding="utf-8", errors="replace").split("---", 2) if card.is_file() else []
    try:
        content: Any = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else {}
    except (yaml.YAMLError, ValueError, RecursionError):  # such as the date 2024-99-99
        content = {}
    for config in _objects(content, "configs"):
        for files in _objects(config, "data_files"):
            if files.get("split") == split:
                path = files.get("path")
                yield from filter(_stays_inside, path if isinstance(path, list) else [path])


def _objects(content: Any, key: str) -> list[dict[str, Any]]:
    """The objects in a list of an object; what has another form is left out."""
    values = content.get(key) if isinstance(content, dict) else None
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


def _stays_inside(pattern: Any) -> bool:
    """Whether a card's pattern names files of its own dataset."""
    return isinstance(pattern, str) and bool(pattern) and pattern[0] != "/" and ".." not in Path(pattern).parts


def check_overlaps(index: QuestionIndex, overlaps: list[Overlap], prompts: int) -> Finding:
    whole = [overlap for overlap in overlaps if overlap.fraction == 1]
    names = sorted({question.benchmark for question in index.questions})
    reason = (
        f"{len(overlaps):,} of {prompts:,} prompts share {NGRAM} words in a row with one of {len(index.questions):,} "
        f"questions ({', '.join(names)}), or all words of a shorter one; {len(whole):,} contain a whole question."
    )
    worst = sorted(overlaps, key=lambda overlap: -overlap.fraction)
    listed = [f"{o.location} ({o.benchmark}, {o.fraction:.0%})" for o in worst[:LISTED]]
    problem = f"They are: {'; '.join(listed)}{'; …' if len(worst) > LISTED else ''}." if listed else ""
    remedy = "Remove them, or do not report these benchmarks. --json lists all such prompts."
    rows = [{name: getattr(o, name) for name in Overlap.__slots__} for o in worst]
    values = {
        "prompts": len(overlaps),
        "whole": len(whole),
        "ngram": NGRAM,
        "questions": len(index.questions),
        "uncompared": index.uncompared,
        "overlaps": rows,
    }
    return finding("benchmarks", reason, problem, remedy, values=values)
