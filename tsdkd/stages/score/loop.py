"""Scores rollouts unit by unit, one teacher after the other, with loaded models, vLLM or a server.

Each unit becomes one part of the scores, which depends on no other part: ranks claim units one by one, and write the
bytes that one process would write. While the models read one block of responses, a thread writes the previous block.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain

import pyarrow as pa

from tsdkd.artifacts.files import HEAD_FILE, teacher_file
from tsdkd.artifacts.manifest import load_manifest
from tsdkd.artifacts.reader import Artifact
from tsdkd.artifacts.writer import TableWriter, Writer
from tsdkd.core import Head
from tsdkd.errors import TsdkdError
from tsdkd.processes import world_size
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.data.rollout_lengths import LENGTH_COLUMNS
from tsdkd.stages.data.score_cost import ScoreCost, ScoreWorkload, format_bytes, score_cost, score_workload
from tsdkd.stages.data.scoring import ScoreRow
from tsdkd.stages.data.signal_storage import SIGNALS_WITH_HEAD, save_head, score_table
from tsdkd.stages.observer import Observer
from tsdkd.stages.score.background import BackgroundWriter
from tsdkd.stages.score.distributed import RankGroup
from tsdkd.stages.score.pairs import ScoringPair, score_table_rows
from tsdkd.stages.score.summary import summarise
from tsdkd.stages.score.units import Unit, divide_rollouts

COLUMNS = ["sample_id", *LENGTH_COLUMNS]
SAMPLED_RESPONSES = 16
"""Responses of a teacher, evenly spread, that measure its speed and captured mass before anything is written."""
OpenPair = Callable[[list[Unit]], AbstractContextManager[ScoringPair]]
"""Opens the student with the teacher of the given units, and frees the teacher's memory afterwards."""


@dataclass(frozen=True, slots=True)
class Scoring:
    """One run of `tsdkd score`: its rollouts, its teachers, and the writer of its scores."""

    rollouts: Artifact
    teachers: Sequence[str]
    """The names of the teachers; "" is that of an only one."""
    planned_head: Callable[[str], Head]
    """A teacher's head before it is loaded, with shape and dtype alone."""
    open_pair: OpenPair
    writer: Writer
    ranks: RankGroup
    config: ScoreConfig
    observer: Observer

    def run(self) -> None:
        """Score the units that are missing, and complete the artifact. Raises TsdkdError when the disk is too small."""
        writer = self.writer
        units = divide_rollouts(self.rollouts, self.teachers, writer.manifest.config.get("teacher_by"))
        by_teacher = {name: [unit for unit in units if unit.teacher == name] for name in self.teachers}
        missing = [name for name, own in by_teacher.items() if own and not all(map(writer.has, self._files(own)))]
        for i, name in enumerate(missing):
            later = [unit for other in missing[i + 1 :] for unit in by_teacher[other]]
            self._score_teacher(by_teacher[name], later, first=i == 0)
        self.ranks.wait()
        if self.ranks.is_main:
            written = Artifact(writer.path, load_manifest(writer.path))
            writer.finish(summarise(written, self.rollouts, units, self.config), self.observer.info)
        self.ranks.wait()

    def _files(self, own: list[Unit]) -> list[str]:
        """The parts of the scores that belong to one teacher."""
        index = self.teachers.index(own[0].teacher) if len(self.teachers) > 1 else None
        head = teacher_file(HEAD_FILE, index)
        return [head] * (self.config.signal in SIGNALS_WITH_HEAD) + [unit.file for unit in own]

    def _score_teacher(self, own: list[Unit], later: list[Unit], *, first: bool) -> None:
        """Score each unit of one teacher that no other rank has claimed. `later`: units of teachers that follow.

        All ranks open the first teacher, and write when the main rank has found that the disk suffices. A later
        teacher is opened by the ranks that have claimed something of it.
        """
        claimed = filter(self.writer.claim, self._files(own))
        start = [] if first else [file for file in [next(claimed, None)] if file]
        if not (first or start):
            return
        with self.open_pair(own) as pair:
            if self.ranks.is_main:
                self._report_cost(pair, own, later)
            if first:
                self.ranks.wait()
            self._write_files(pair, own, chain(start, claimed))

    def _write_files(self, pair: ScoringPair, own: list[Unit], claimed: Iterable[str]) -> None:
        by_file, writer, counted = {unit.file: unit for unit in own}, self.writer, self._listed(own)
        label = " ".join(filter(None, ["student and teacher", own[0].teacher, "score"]))
        total = sum(len(unit.rows) for unit in own)
        with self.observer.progress(label, total, "responses", counted) as advance, BackgroundWriter() as background:
            for file in claimed:
                if file not in by_file:
                    save_head(pair.head, writer.temporary_path(file))
                    writer.add_file(file)
                    continue
                by_others = max(0, self._listed(own) - counted)
                advance(by_others)
                counted += by_others + len(by_file[file].rows)
                for write, arguments in self._write_unit(pair, by_file[file], advance):
                    background.submit(write, *arguments)

    def _write_unit(
        self, pair: ScoringPair, unit: Unit, advance: Callable[[int], None]
    ) -> Iterator[tuple[Callable[..., None], tuple[object, ...]]]:
        """Yield calls that write the part of a unit, one by one."""
        named = {"teacher": unit.teacher} if unit.teacher else {}
        table_writer = TableWriter(self.writer, unit.file, [*pair.columns, *named])
        for rows in score_table_rows(pair, unit.read(self.rollouts, COLUMNS), self.config, advance):
            yield _write, (table_writer, rows, named)
        yield table_writer.close, ()

    def _listed(self, own: list[Unit]) -> int:
        """The rows of a teacher's parts that are complete."""
        return sum(len(unit.rows) for unit in own if self.writer.has(unit.file))

    def _report_cost(self, pair: ScoringPair, own: list[Unit], later: list[Unit]) -> None:
        """Report bytes, tokens and expected time of a teacher's missing parts.

        Raises TsdkdError when the disk is too small for them and for those of the teachers that follow.
        """
        directory, config, name = self.writer.path, self.config, own[0].teacher
        workload = self._workload(own)
        costs = [score_cost(config, pair.head, workload.response_tokens), *self._costs(later)]
        free, needed = shutil.disk_usage(directory).free, sum(cost.bytes for cost in costs)
        rate = world_size() * pair.tokens_per_second(self._sample(own))
        minutes = workload.tokens / rate / 60
        following = [("on disk with the teachers that follow", format_bytes(needed))] if later else []
        self.observer.table(
            f"Cost of scoring with {name}" if name else "Cost of scoring",
            [
                *costs[0].rows(),
                *following,
                ("free on disk", format_bytes(free)),
                ("tokens to read", f"{workload.tokens:,}"),
                ("expected time", f"{minutes:,.1f} min" + (f" in {world_size()} processes" * (world_size() > 1))),
            ],
        )
        if needed > free:
            smaller = "a smaller --top-k" if pair.columns else "--signal hidden8 or topk"
            raise TsdkdError(
                f"Scores need {format_bytes(needed)}, but {directory} has {format_bytes(free)} free.",
                f"Free space, choose another --scores directory, or use {smaller}.",
            )

    def _costs(self, units: list[Unit]) -> list[ScoreCost]:
        names = dict.fromkeys(unit.teacher for unit in units)
        by_name = {name: self._workload([unit for unit in units if unit.teacher == name]) for name in names}
        return [score_cost(self.config, self.planned_head(name), w.response_tokens) for name, w in by_name.items()]

    def _workload(self, units: list[Unit]) -> ScoreWorkload:
        """The workload of the units that are missing."""
        workload = ScoreWorkload()
        for unit in units:
            if not self.writer.has(unit.file):
                workload += score_workload(unit.read(self.rollouts, LENGTH_COLUMNS))
        return workload

    def _sample(self, own: list[Unit]) -> pa.Table:
        """Rows of a teacher, evenly spread, whatever is complete: a run that continues measures the same rows."""
        total, start, tables = sum(len(unit.rows) for unit in own), 0, []
        indices = range(0, total, max(1, total // SAMPLED_RESPONSES))[:SAMPLED_RESPONSES]
        for unit in own:
            if rows := [index - start for index in indices if start <= index < start + len(unit.rows)]:
                tables.append(unit.read(self.rollouts, COLUMNS).take(rows))
            start += len(unit.rows)
        return pa.concat_tables(tables)


def _write(table_writer: TableWriter, rows: list[ScoreRow], named: dict[str, str]) -> None:
    for row in rows:  # one response per row group, because training reads rows in random order
        table_writer.write(score_table(row | named))
