"""The handler of score's tasks: reads responses with the student and one teacher, and writes the parts of the scores.

While the models read one block of responses, a thread writes the previous block.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import pyarrow as pa

from tsdkd.artifacts.writer import TableWriter
from tsdkd.core import Head
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.data.scoring import ScoreRow
from tsdkd.stages.data.signal_storage import save_head, score_table
from tsdkd.stages.models.device import free_memory
from tsdkd.stages.observer import Observer
from tsdkd.stages.parallel.part_files import PartDestination, WrittenPart
from tsdkd.stages.parallel.tasks import Advance, Finish
from tsdkd.stages.score.background import BackgroundWriter
from tsdkd.stages.score.pairs import LoadedPair, ScoringPair, load_reading_model, score_table_rows

OpenPair = Callable[[str, pa.Table], AbstractContextManager[ScoringPair]]
"""Opens the student with a teacher by its name, for a task's rows of rollouts, and frees its memory afterwards."""


@dataclass(frozen=True, slots=True)
class ScoreTask:
    """Rows of the rollouts that one teacher reads.

    `file`: the part of the scores to write, with these rows or with the teacher's head; None: measure the rate only.
    """

    teacher: str
    table: pa.Table
    file: str | None = None
    is_head: bool = False


@dataclass(frozen=True, slots=True)
class PairProbe:
    """What a worker measures before anything is written."""

    tokens_per_second: float
    head: Head
    """Shape and dtype alone."""
    columns: tuple[str, ...]
    """The optional ones of the pair's rows."""


@dataclass(slots=True)
class Scorer:
    """Runs tasks with one teacher at a time; keeps the pair for the next task."""

    open_pair: OpenPair
    config: ScoreConfig
    destination: PartDestination
    background: BackgroundWriter
    _stack: ExitStack = field(default_factory=ExitStack)
    _open: tuple[str, ScoringPair] | None = None

    def run(self, task: ScoreTask, advance: Advance) -> Finish:
        pair = self._pair(task)
        if task.file is None:
            rate, head = pair.tokens_per_second(task.table), pair.head
            probe = PairProbe(rate, Head(head.weight.to("meta")), pair.columns)
            return lambda: probe
        path = self.destination.new_path()
        if task.is_head:
            save_head(pair.head, path)
            return partial(self.destination.deliver, task.file, path)
        named = {"teacher": task.teacher} if task.teacher else {}
        writer = TableWriter(path, "scores", [*pair.columns, *named])
        for rows in score_table_rows(pair, task.table, self.config, advance):
            self.background.submit(_write, writer, rows, named)
        return self.background.submit(self._close, writer, task.file, path).result

    def _pair(self, task: ScoreTask) -> ScoringPair:
        if self._open is None or self._open[0] != task.teacher:
            self.close()
            self._open = task.teacher, self._stack.enter_context(self.open_pair(task.teacher, task.table))
        return self._open[1]

    def _close(self, writer: TableWriter, file: str, path: Path) -> WrittenPart:
        return self.destination.deliver(file, path, writer.close())

    def close(self) -> None:
        self._open = None
        self._stack.close()


@dataclass(frozen=True, slots=True)
class OpenScorer:
    """Opens a scorer with a loaded student, and loaded teachers by name."""

    student: str
    teachers: Mapping[str, str]
    vocab: int
    """The ids that are compared."""
    longest: int
    """Tokens of the longest sequence."""
    config: ScoreConfig
    destination: PartDestination

    @contextmanager
    def __call__(self, observer: Observer) -> Iterator[Callable[[ScoreTask, Advance], Finish]]:
        load = partial(load_reading_model, vocab=self.vocab, config=self.config, observer=observer)
        load_student = cache(partial(load, self.student))

        @contextmanager
        def open_pair(teacher: str, table: pa.Table) -> Iterator[ScoringPair]:
            if self.config.engine == "vllm":
                from tsdkd.stages.engines.vllm_reader import open_readers

                sequences = [row["prompt_ids"] + row["response_ids"] for row in table.to_pylist()]
                settings = self.config, self.longest, sequences, observer, self.vocab
                with open_readers(self.student, self.teachers[teacher], *settings) as models:
                    yield LoadedPair(models, self.config)
                return
            free_memory()  # of the teacher before
            yield LoadedPair((load_student(), load(self.teachers[teacher])), self.config)

        with opened_scorer(open_pair, self.config, self.destination) as run:
            yield run


@contextmanager
def opened_scorer(
    open_pair: OpenPair, config: ScoreConfig, destination: PartDestination
) -> Iterator[Callable[[ScoreTask, Advance], Finish]]:
    """A handler of tasks, with any pair."""
    with BackgroundWriter() as background:
        scorer = Scorer(open_pair, config, destination, background)
        try:
            yield scorer.run
        finally:
            scorer.close()


def _write(writer: TableWriter, rows: list[ScoreRow], named: dict[str, str]) -> None:
    for row in rows:  # one response per row group, because training reads rows in random order
        writer.write(score_table(row | named))
