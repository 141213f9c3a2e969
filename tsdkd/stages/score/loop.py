"""Scores rollouts unit by unit, one teacher after the other, with loaded models, vLLM or a server.

Each unit becomes one part of the scores, which depends on no other part: workers write the bytes that one process would
write.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from tsdkd.artifacts.files import HEAD_FILE, teacher_file
from tsdkd.artifacts.reader import Artifact
from tsdkd.artifacts.writer import Writer
from tsdkd.core import Head
from tsdkd.errors import TsdkdError
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.data.rollout_lengths import LENGTH_COLUMNS
from tsdkd.stages.data.score_cost import ScoreCost, ScoreWorkload, format_bytes, score_cost, score_workload
from tsdkd.stages.data.signal_storage import SIGNALS_WITH_HEAD
from tsdkd.stages.observer import Observer
from tsdkd.stages.parallel.part_files import add_part
from tsdkd.stages.parallel.pool import Pool
from tsdkd.stages.parallel.tasks import OpenHandler
from tsdkd.stages.score.scorer import PairProbe, ScoreTask
from tsdkd.stages.score.summary import summarise
from tsdkd.stages.score.units import Unit, divide_rollouts

COLUMNS = ["sample_id", *LENGTH_COLUMNS]
SAMPLED_RESPONSES = 16
"""Responses of a teacher, evenly spread, that measure its speed and captured mass before anything is written."""


@dataclass(frozen=True, slots=True)
class Scoring:
    """One run of `tsdkd score`: its rollouts, its teachers, and the writer of its scores."""

    rollouts: Artifact
    teachers: Sequence[str]
    """The names of the teachers; "" is that of an only one."""
    planned_head: Callable[[str], Head]
    """A teacher's head before it is loaded, with shape and dtype alone."""
    open_scorer: OpenHandler
    pool: Pool
    writer: Writer
    config: ScoreConfig
    observer: Observer

    def run(self) -> Artifact:
        """Score the units that are missing, and complete the artifact. Raises TsdkdError when the disk is too small."""
        writer = self.writer
        units = divide_rollouts(self.rollouts, self.teachers, writer.manifest.config.get("teacher_by"))
        by_teacher = {name: [unit for unit in units if unit.teacher == name] for name in self.teachers}
        missing = [name for name, own in by_teacher.items() if own and not all(map(writer.has, self._files(own)))]
        for i, name in enumerate(missing):
            later = [unit for other in missing[i + 1 :] for unit in by_teacher[other]]
            self._score_teacher(by_teacher[name], later)
        return writer.finish(summarise(writer.artifact, self.rollouts, units, self.config), self.observer.info)

    def _files(self, own: list[Unit]) -> list[str]:
        """The parts of the scores that belong to one teacher."""
        return [self._head_file(own)] * (self.config.signal in SIGNALS_WITH_HEAD) + [unit.file for unit in own]

    def _head_file(self, own: list[Unit]) -> str:
        return teacher_file(HEAD_FILE, self.teachers.index(own[0].teacher) if len(self.teachers) > 1 else None)

    def _score_teacher(self, own: list[Unit], later: list[Unit]) -> None:
        """Write the missing parts of one teacher. `later`: units of teachers that follow."""
        self.pool.run(
            self.open_scorer,
            [ScoreTask(own[0].teacher, self._sample(own))],
            lambda _, probe: self._report_cost(probe, own, later),
        )
        label = " ".join(filter(None, ["student and teacher", own[0].teacher, "score"]))
        total, done = (sum(len(unit.rows) for unit in units) for units in (own, filter(self._is_listed, own)))
        with self.observer.progress(label, total, "responses", done) as advance:
            self.pool.run(
                self.open_scorer,
                self._tasks(own),
                lambda _, part: add_part(self.writer, part),
                advance,
                depth=2,
            )

    def _tasks(self, own: list[Unit]) -> Iterator[ScoreTask]:
        """The tasks that write the missing parts of one teacher."""
        name, missing = own[0].teacher, {file for file in self._files(own) if not self.writer.has(file)}
        if (head := self._head_file(own)) in missing:
            yield ScoreTask(name, self._sample(own), head, is_head=True)
        for unit in own:
            if unit.file in missing:
                yield ScoreTask(name, unit.read(self.rollouts, COLUMNS), unit.file)

    def _is_listed(self, unit: Unit) -> bool:
        return self.writer.has(unit.file)

    def _report_cost(self, probe: PairProbe, own: list[Unit], later: list[Unit]) -> None:
        """Report bytes, tokens and expected time of a teacher's missing parts.

        Raises TsdkdError when the disk is too small for them and for those of the teachers that follow.
        """
        directory, config, name = self.writer.path, self.config, own[0].teacher
        workload = self._workload(own)
        costs = [score_cost(config, probe.head, workload.response_tokens), *self._costs(later)]
        free, needed = shutil.disk_usage(directory).free, sum(cost.bytes for cost in costs)
        workers = min(self.pool.count, sum(not self._is_listed(unit) for unit in own) or 1)
        minutes = workload.tokens / probe.tokens_per_second / workers / 60
        following = [("on disk with the teachers that follow", format_bytes(needed))] if later else []
        self.observer.table(
            f"Cost of scoring with {name}" if name else "Cost of scoring",
            [
                *costs[0].rows(),
                *following,
                ("free on disk", format_bytes(free)),
                ("tokens to read", f"{workload.tokens:,}"),
                ("expected time", f"{minutes:,.1f} min" + (f" in {workers} processes" * (workers > 1))),
            ],
        )
        if needed > free:
            smaller = "a smaller --top-k" if probe.columns else "--signal hidden8 or topk"
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
