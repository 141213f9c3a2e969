"""Estimates of tiny models, by hand: what a token costs, what lies on disk, how long a step of decoding takes."""

from pathlib import Path

import pytest

from tsdkd.stages.config.eval import EvalConfig
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.config.train import LoRAConfig, TrainConfig
from tsdkd.stages.plan import estimates, rates
from tsdkd.stages.plan.benchmark_lengths import benchmark_length
from tsdkd.stages.plan.chain import Workload
from tsdkd.stages.plan.models import PlannedModel, find_planned_model
from tsdkd.stages.plan.rates import EFFICIENCY, Rates
from tsdkd.stages.results.benchmarks import BENCHMARKS

MULTIPLYING = Rates("cpu", "float32", flops=1e6 / EFFICIENCY, bytes=1e18)
"""A million operations a second are reached, and moving costs nothing."""
MOVING = Rates("cpu", "float32", flops=1e18, bytes=1e6 / EFFICIENCY)
TEXTS = Workload(count=10, prompt=20, response=5, longest=30, at_most=False)

# Width 32, inner 64, two layers of four heads of 8, two of them for keys; 264 ids; embedding and head are apart.
LAYER = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64 + 2 * 32
MULTIPLIED = 2 * LAYER + 32 + 264 * 32
STUDENT = MULTIPLIED + 264 * 32
# Width 48, inner 96, four layers of four heads of 12, 272 ids.
TEACHER = 4 * (48 * 48 + 2 * 48 * 24 + 48 * 48 + 3 * 48 * 96 + 2 * 48) + 48 + 272 * 48


@pytest.fixture
def small(student: Path) -> PlannedModel:
    return find_planned_model(str(student))


@pytest.fixture
def large(teacher: Path) -> PlannedModel:
    return find_planned_model(str(teacher))


def test_sizes_are_those_of_the_weights(small: PlannedModel, large: PlannedModel) -> None:
    assert (small.size.parameters, small.size.matmul_parameters) == (STUDENT, MULTIPLIED)
    assert large.size.matmul_parameters == TEACHER
    assert small.weights("float32") == 2 * small.weights("bfloat16") == 4 * STUDENT
    assert small.without_layers(1).size.parameters == STUDENT - LAYER


def test_a_tied_embedding_is_multiplied_with(small: PlannedModel) -> None:
    small.config.tie_word_embeddings = True
    assert small.size.parameters == small.size.matmul_parameters == MULTIPLIED


def test_reading_costs_two_operations_a_weight_and_token(small: PlannedModel, large: PlannedModel) -> None:
    """250 tokens by both models; on disk 10 x 5 tokens of 16 + 10 x 6 + 48 x 4 bytes, and the teacher's head."""
    found = estimates.score(small, large, TEXTS, ScoreConfig(k=10), MULTIPLYING)
    assert found.seconds == pytest.approx(2 * (MULTIPLIED + TEACHER) * 250 / 1e6)
    assert found.disk == 50 * (16 + 60 + 192) + 272 * 48 * 4
    assert found.amount == "250 tokens"


@pytest.mark.parametrize(
    ("changes", "operations"),
    [({}, 6), ({"gradient_checkpointing": True}, 8), ({"lora": LoRAConfig(rank=2)}, 4)],
)
def test_training_costs_six_four_with_adapters_and_two_more_with_checkpoints(
    small: PlannedModel, large: PlannedModel, changes: dict[str, object], operations: int
) -> None:
    """Three epochs of 10 responses in batches of 4 are nine steps; the teacher's head reads 150 response tokens."""
    config = TrainConfig(batch_size=4, epochs=3, save_steps=8, **changes)
    found = estimates.train(small, large, TEXTS, config, "float32", MULTIPLYING)
    assert found.amount == "9 steps of 4"
    flops = operations * MULTIPLIED * 750 + 2 * 272 * 48 * 150
    assert found.seconds == pytest.approx(flops / 1e6)
    # An adapter's rank meets q, k, v, o, gate, up and down of two layers.
    learned = 2 * 2 * (64 + 48 + 48 + 64 + 3 * 96) if "lora" in changes else STUDENT
    assert found.disk == 4 * learned
    assert found.aside == 2 * 12 * learned  # steps 8 and 9 are saved


def test_live_training_also_answers_and_has_the_teacher_read(small: PlannedModel, large: PlannedModel) -> None:
    from tsdkd.stages.config.train import OnlineConfig

    staged = TrainConfig(batch_size=4, epochs=1)
    live = TrainConfig(batch_size=4, epochs=1, online=OnlineConfig(sampling=GenerateConfig(engine="transformers")))
    before, found = (
        estimates.train(small, large, TEXTS, config, "float32", MULTIPLYING).seconds for config in (staged, live)
    )
    reading = 2 * TEACHER * 250 - 2 * 272 * 48 * 50
    steps = 3 * 5 * 4  # ten answers, four at a time, five tokens
    answering = 2 * MULTIPLIED * (10 * 20 + steps)
    assert found - before == pytest.approx((reading + answering) / 1e6)


def test_a_teacher_that_answers_along_is_reckoned_with(small: PlannedModel, large: PlannedModel) -> None:
    from tsdkd.stages.config.train import OnlineConfig

    alone, along = (
        TrainConfig(batch_size=4, online=OnlineConfig(sampling=GenerateConfig(engine="transformers", policy=policy)))
        for policy in ("student", "teacher-mixed")
    )
    before, found = (estimates.train(small, large, TEXTS, one, "float32", MOVING).seconds for one in (alone, along))
    assert found > 2 * before


def test_decoding_waits_for_multiplying_or_for_moving(small: PlannedModel) -> None:
    """Ten responses of five tokens, four at a time, are 15 steps; each moves the weights and four caches of 22.5."""
    config = GenerateConfig(engine="transformers", batch_size=4)
    found = estimates.generate([small], [1.0], TEXTS, config, MULTIPLYING)
    assert found.seconds == pytest.approx(2 * MULTIPLIED * (200 + 15 * 4) / 1e6)
    cached = 2 * 2 * 2 * 8 * 4  # keys and values, two layers, two heads of 8, float32
    found = estimates.generate([small], [1.0], TEXTS, config, MOVING)
    assert found.seconds == pytest.approx(15 * (4 * MULTIPLIED + 4 * 22.5 * cached) / 1e6, rel=1e-6)
    assert found.memory == 4 * STUDENT + 4 * small.sequence("float32", 30, 1)


def test_a_share_each_is_less_than_both(small: PlannedModel, large: PlannedModel) -> None:
    def seconds(*shares: float) -> float:
        config = GenerateConfig(engine="transformers", policy="mixed", batch_size=1)
        return estimates.generate([small, large], shares, TEXTS, config, MULTIPLYING).seconds

    assert seconds(0.5, 0.5) == pytest.approx((seconds(1, 0) + seconds(0, 1)) / 2)
    assert seconds(1, 1) == pytest.approx(seconds(1, 0) + seconds(0, 1))


def test_eval_reads_choices_and_generates_answers_up_to_a_limit(small: PlannedModel) -> None:
    def seconds(task: str, **more: object) -> float:
        config = EvalConfig(tasks=(task,), limit=6, batch_size=3, **more)
        return estimates.evaluate([small, small], None, config, MULTIPLYING).seconds

    tokens = benchmark_length(BENCHMARKS["sciq"])[1]
    assert seconds("sciq") == pytest.approx(2 * 2 * MULTIPLIED * 6 * tokens / 1e6)
    tokens = benchmark_length(BENCHMARKS["mbpp"])[1]
    assert seconds("mbpp", max_new_tokens=10) == pytest.approx(2 * 2 * MULTIPLIED * 6 * (tokens + 10) / 1e6)
    assert estimates.evaluate([small], TEXTS, EvalConfig(tasks=()), MULTIPLYING).seconds == pytest.approx(
        2 * MULTIPLIED * 250 / 1e6
    )


def test_every_benchmark_has_a_length() -> None:
    assert all(min(benchmark_length(benchmark)) > 0 for benchmark in BENCHMARKS.values())


def test_lengths_are_those_of_the_real_rows(shared: Path) -> None:
    """Documents of benchmarks that are complete there."""
    import pyarrow.parquet as pq

    folders = {"gsm8k": "test", "sciq": "test", "mbpp": "test", "ifeval": "train", "math": "test", "bbh": "test"}
    for name, split in folders.items():
        files = (shared / "benchmarks" / name).rglob(f"{split}.parquet")
        assert sum(pq.read_metadata(file).num_rows for file in files) == benchmark_length(BENCHMARKS[name])[0]


def test_rates_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clock: a product of 2 x 8 x 8 x 8 operations and a copy of 100 bytes, a tenth of a second each."""
    clock = iter(range(1000))
    monkeypatch.setattr(rates, "SIDE", {"cpu": 8})
    monkeypatch.setattr(rates, "COPIED", {"cpu": 100})
    monkeypatch.setattr("tsdkd.stages.plan.rates.time.perf_counter", lambda: next(clock) / 10)
    monkeypatch.setattr(rates, "default_device", lambda: "cpu")
    found = rates.measure_rates()
    assert (found.flops, found.bytes) == (pytest.approx(10_240), pytest.approx(2_000))
