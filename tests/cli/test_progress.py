"""Progress of a stage: bar, metrics and sparklines on a terminal, lines in a log."""

import io
from contextlib import contextmanager

import pytest
from rich.console import Console
from rich.progress import Progress
from rich.tree import Tree

from tsdkd.cli import console, progress
from tsdkd.cli.progress import (
    BLOCKS,
    LABEL_WIDTH,
    MAX_POINTS,
    LeftColumn,
    MetricDisplay,
    MetricHistory,
    RateColumn,
    sparkline,
)


def test_a_sparkline_runs_from_lowest_to_highest() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 60) == BLOCKS
    assert sparkline([3, 1, 2], 60) == "█▁▅"  # 2 lies in the middle: block 3.5 of 0 to 7
    assert sparkline([2.5], 60) == sparkline([0.0], 60) == "▁"
    assert sparkline([-1, -1, -2], 60) == "██▁"


def test_a_long_history_becomes_means_of_neighbours() -> None:
    assert sparkline([0, 10, 5, 5, 10, 10], 3) == "▁▁█"
    assert len(sparkline([float(i) for i in range(1000)], 34)) == 34


def test_a_long_history_is_thinned_and_its_range_is_not() -> None:
    history = MetricHistory()
    values = [float(step % 7) for step in range(99_999)]
    values[5000], values[-1] = 100.0, -3.0
    for value in values:
        history.add(value)
    assert MAX_POINTS / 2 <= len(history.points) <= MAX_POINTS
    assert (history.low, history.high, history.last) == (-3.0, 100.0, -3.0)
    assert history.points[0] == pytest.approx(sum(values[:64]) / 64)
    assert history.points[-1] == pytest.approx(sum(values[99_968:]) / 31)


def test_bytes_are_shown_as_megabytes() -> None:
    clock = [0.0]
    bar = Progress(RateColumn(), get_time=lambda: clock[0])
    bar.add_task("sending", total=10**9, completed=0, unit="bytes", initial=0)
    clock[0] = 2.0
    bar.advance(bar.tasks[0].id, 10**8)
    assert bar.columns[0].render(bar.tasks[0]).plain == "50.0 MB/s"
    log = Console(file=io.StringIO(), width=200)
    lines = progress.ProgressLines(log, "sending", 10**9, "bytes", 0)
    lines.start = lines.last_line = lines.start - 120
    lines.advance(10**8)
    assert log.file.getvalue() == "sending: 100 of 1,000 MB, 50.0 a minute, 18 min left\n"


def test_the_rate_is_the_mean_since_the_start() -> None:
    """A batch of ten requests ends after a minute; four requests were complete before."""
    clock = [0.0]
    progress = Progress(RateColumn(), LeftColumn(), get_time=lambda: clock[0])
    progress.add_task("x", total=34, completed=4, unit="requests", initial=4)
    (task,) = progress.tasks
    assert [column.render(task).plain for column in progress.columns] == ["", "-:--:-- left"]
    clock[0] = 60.0
    for _ in range(10):
        progress.advance(task.id, 1)
    assert [column.render(task).plain for column in progress.columns] == ["10.0 requests/min", "0:02:00 left"]


def test_names_like_emoji_codes_are_shown_unchanged(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    console.show_pairs("runs/:key:", [(":100:", "[b] :key:")])
    console.show_table(":key:", [":100:"], [[":key:"]])
    console.show_next("tsdkd eval --run runs/:key:")
    console.ConsoleObserver().warning("runs/:key: [b]")
    console.show_tree(Tree("runs/:key:"))
    shown = capsys.readouterr()
    assert (shown.out.count(":key:"), shown.out.count(":100:")) == (6, 2)
    assert shown.err == "runs/:key: [b]\n"


def test_metrics_fit_80_columns() -> None:
    metrics = MetricDisplay()
    for step in range(200):
        metrics.add({"loss": 1.5 - step / 1000, "response length": -0.0049371 + step / 7777, "drift": -0.00567891})
        if step % 50 == 49:
            metrics.add({"held-out KL": 0.4 - step / 1000})
    target = io.StringIO()
    Console(file=target, width=80).print(metrics)
    rows = target.getvalue().splitlines()
    assert [row.split("  ")[0].strip() for row in rows] == ["loss", "response length", "drift", "held-out KL"]
    assert max(map(len, rows)) <= 80
    assert "…" not in target.getvalue()
    name, value, line, *range_ = rows[0].split()
    assert (name, value, range_) == ("loss", "1.301", ["1.3", "to", "1.5"])
    assert len(line) == 80 - LABEL_WIDTH
    assert line == "".join(sorted(line, reverse=True))
    assert {line[0], line[-1]} == {"█", "▁"}
    assert rows[3].split()[2:] == ["0.201", "█▆▃▁", "0.201", "to", "0.351"]


@pytest.mark.parametrize(
    ("terminal", "plain", "draws"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_plain_output_has_no_bar(monkeypatch: pytest.MonkeyPatch, terminal: bool, plain: bool, draws: bool) -> None:
    target = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=target, force_terminal=terminal, width=80))
    drawn = []

    @contextmanager
    def bar(*arguments: object) -> object:
        drawn.append(arguments)
        yield (lambda _: None), (lambda _: None)

    monkeypatch.setattr(progress, "progress_bar", bar)
    observer = console.ConsoleObserver(plain=plain)
    with observer.progress("training", 2, "steps") as advance:
        observer.metrics({"loss": 1.0})
        advance(1)
    assert bool(drawn) == draws
    assert target.getvalue() == ""


def test_a_bar_shows_the_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    target = io.StringIO()
    screen = Console(file=target, force_terminal=True, width=80)
    with progress.progress_bar(screen, "training", 3, "steps", 1) as (advance, metrics):
        metrics({"loss": 2.0})
        metrics({"loss": 1.0, "held-out KL": 0.5})
        advance(1)
    assert "█▁" in target.getvalue()
    assert "held-out KL" in target.getvalue()
    assert "2/3" in target.getvalue()
