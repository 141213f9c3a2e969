"""The report's tables of responses by teacher and by source."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from tests.helpers.runs import STUDENT, make_run
from tsdkd.artifacts.manifest import Manifest, ModelRecord, Parent, load_manifest
from tsdkd.artifacts.schemas import schema_of
from tsdkd.artifacts.writer import Writer
from tsdkd.stages.config.generate import GenerateConfig, recorded_sampling
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.report.descriptions import describe_artifacts
from tsdkd.stages.report.groups import group_tables
from tsdkd.stages.report.runs import load_runs
from tsdkd.stages.report.stage import report
from tsdkd.stages.results.compare import Comparison
from tsdkd.stages.results.model_names import model_sort_key, teacher_results
from tsdkd.stages.results.tables import comparison_tables, held_out_tables

TEACHERS = tuple(ModelRecord(f"teacher:{name}", f"models/{name}-7b", "b" * 64, "t", "c") for name in ("code", "math"))


def write_run(
    directory: Path, rows: list[tuple[str, str | None, int, str]], teacher_by: str | None, measured: Mapping[str, Any]
) -> Path:
    """Rollouts and scores. `rows`: source, teacher, tokens and finish reason; `measured`: by teacher."""
    config = recorded_sampling(GenerateConfig(teacher_by=teacher_by, part_size=2, engine="transformers"))
    manifest = Manifest("rollouts", config, 0, (), (STUDENT, *TEACHERS))
    names = ["teacher"] if teacher_by else []
    schema = schema_of("rollouts", names)
    table = [
        {
            **dict.fromkeys(schema.names),
            "sample_id": f"{i}-0",
            "prompt_id": f"{i}",
            "messages": [{"role": "user", "content": "?"}],
            "source": source,
            "teacher": teacher,
            "prompt_ids": [1],
            "response_ids": [2] * tokens,
            "response": "",
            "finish_reason": reason,
            "author": "student",
            "teacher_tokens": 0,
        }
        for i, (source, teacher, tokens, reason) in enumerate(rows)
    ]
    counts = {"responses": len(rows), "response_tokens": 1, "teacher_tokens": 0, "truncated": 1}
    with Writer.open(directory / "rollouts", manifest) as writer:
        for n, part in enumerate((table[:2], table[2:])):
            writer.write_table(f"part-{n:05d}.parquet", pa.Table.from_pylist(part, schema))
        writer.finish({"prompts": len(rows), "prompts_skipped": {}, **counts})
    parent = Parent("rollouts", load_manifest(directory / "rollouts").fingerprint, "../rollouts")
    settings = asdict(ScoreConfig())
    with Writer.open(directory / "scores", Manifest("scores", settings, 0, (parent,), (STUDENT, *TEACHERS))) as writer:
        writer.finish({"response_tokens": 1, "teachers": measured})
    return directory


def test_responses_are_shown_by_teacher_and_by_source(tmp_path: Path) -> None:
    rows = [
        ("a", "math", 4, "stop"),
        ("b", "code", 10, "length"),
        ("a", "math", 8, "length"),
        ("b", "math", 3, "early"),
    ]
    measured = {"math": {"student_entropy": 2.0, "teacher_entropy": 1.0}, "code": {"student_entropy": 0.5}}
    directory = write_run(tmp_path / "run", rows, "field", measured)
    (run,) = load_runs([directory])
    by_teacher, by_source = group_tables(run)
    counts = ["responses", "tokens", "mean length", "truncated"]
    assert by_teacher == (
        "Responses by teacher",
        ["teacher", "model", *counts, "student entropy", "teacher entropy"],
        [
            ["code", "code-7b", "1", "10", "10.0", "100.0%", "0.500", ""],
            ["math", "math-7b", "3", "15", "5.0", "33.3%", "2.000", "1.000"],
        ],
    )
    assert by_source == (
        "Responses by source",
        ["source", *counts],
        [["a", "2", "12", "6.0", "50.0%"], ["b", "2", "13", "6.5", "50.0%"]],
    )
    described = dict(describe_artifacts(run))
    assert "the teacher code-7b (code) and the teacher math-7b (math)" in described["scores"].lower()
    assert "Responses by teacher" in report([directory], tmp_path / "page.html").read_text()


def test_sources_that_name_the_teachers_are_one_table(tmp_path: Path) -> None:
    """Of rollouts without names, whose scores took the source; one source of an only teacher has no table."""
    rows = [("math", None, 4, "stop"), ("code", None, 10, "stop"), ("math", None, 8, "stop")]
    (run,) = load_runs([write_run(tmp_path / "run", rows, None, {"math": {"teacher_entropy": 1.0}})])
    ((title, columns, cells),) = group_tables(run)
    assert title == "Responses by teacher"
    assert columns[-1] == "teacher entropy"
    assert [row[:4] for row in cells] == [["code", "code-7b", "1", "10"], ["math", "math-7b", "2", "12"]]
    (one,) = load_runs([make_run(tmp_path / "one")])
    assert group_tables(one) == []


def test_divergence_is_shown_by_teacher() -> None:
    measures = {"kl": 1.0, "kl_stderr": 0.1, "top1_agreement": 0.5, "entropy": 2.0}
    named = {
        name: measures | {"teachers": {"b": measures | {"kl": kl}, "a": measures}} for name, kl in (("x", 2), ("y", 3))
    }
    comparison = Comparison((), "x", {}, {}, {}, named)
    whole, by_teacher = held_out_tables(comparison)
    assert [row[0] for row in whole[2]] == ["x", "y"]
    assert [row[:3] for row in by_teacher[2]] == [
        *(["a", name, "1.0000 ± 0.1000"] for name in ("x", "y")),
        *(["b", name, f"{kl}.0000 ± 0.1000"] for name, kl in (("x", 2), ("y", 3))),
    ]
    assert comparison_tables([replace(comparison, benchmarks=("gsm8k",))], ())[1:] == [by_teacher]


def test_results_of_teachers_come_first() -> None:
    names = ["distilled", teacher_results("b c/d"), "other", "student", teacher_results("a"), teacher_results("")]
    ordered = sorted(map(Path, names), key=model_sort_key)
    assert [path.name for path in ordered] == [
        "teacher",
        "teacher-a",
        "teacher-b%20c%2Fd",
        "student",
        "distilled",
        "other",
    ]
