"""Estimates for tiny models equal calculations by hand: operations per token, bytes on disk, time per decoding step."""

from dataclasses import replace
from pathlib import Path

import pytest

from tsdkd.stages.config.eval import EvalConfig
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.config.train import LoRAConfig, OnlineConfig, TrainConfig
from tsdkd.stages.plan import estimates, rates
from tsdkd.stages.plan.benchmark_lengths import benchmark_length
from tsdkd.stages.plan.chain import Workload
from tsdkd.stages.plan.models import PlannedModel, load_planned_model
from tsdkd.stages.plan.rates import EFFICIENCY, Rates
from tsdkd.stages.results.benchmarks import BENCHMARKS

COMPUTE_BOUND = Rates("cpu", "float32", flops_per_second=1e6 / EFFICIENCY, bytes_per_second=1e18)
"""Reaches a million operations per second; moving bytes costs nothing."""
MEMORY_BOUND = Rates("cpu", "float32", flops_per_second=1e18, bytes_per_second=1e6 / EFFICIENCY)
WORKLOAD = Workload(count=10, prompt_tokens=20, response_tokens=5, max_tokens=30, is_upper_bound=False)

# Width 32, inner 64, two layers of four heads of 8 with two key-value heads; 264 ids; embedding and head are untied.
LAYER = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64 + 2 * 32
MULTIPLIED = 2 * LAYER + 32 + 264 * 32
STUDENT = MULTIPLIED + 264 * 32
# Width 48, inner 96, four layers of four heads of 12, 272 ids.
TEACHER = 4 * (48 * 48 + 2 * 48 * 24 + 48 * 48 + 3 * 48 * 96 + 2 * 48) + 48 + 272 * 48


@pytest.fixture
def small(student: Path) -> PlannedModel:
    return load_planned_model(str(student))


@pytest.fixture
def large(teacher: Path) -> PlannedModel:
    return load_planned_model(str(teacher))


def test_sizes_equal_the_weights(small: PlannedModel, large: PlannedModel) -> None:
    assert (small.size.parameters, small.size.matmul_parameters) == (STUDENT, MULTIPLIED)
    assert large.size.matmul_parameters == TEACHER
    assert small.weight_bytes("float32") == 2 * small.weight_bytes("bfloat16") == 4 * STUDENT
    assert small.without_layers(1).size.parameters == STUDENT - LAYER


def test_a_tied_embedding_counts_as_the_head(small: PlannedModel) -> None:
    small.config.tie_word_embeddings = True
    assert small.size.parameters == small.size.matmul_parameters == MULTIPLIED


def test_scoring_costs_two_operations_per_weight_and_token(small: PlannedModel, large: PlannedModel) -> None:
    """250 tokens by both models; on disk 10 x 5 tokens of 16 + 10 x 6 + 48 x 4 bytes, and the teacher's head."""
    estimate = estimates.estimate_score(small, [(large, 1.0)], WORKLOAD, ScoreConfig(k=10), COMPUTE_BOUND)
    assert estimate.seconds == pytest.approx(2 * (MULTIPLIED + TEACHER) * 250 / 1e6)
    assert estimate.disk == 50 * (16 + 60 + 192) + 272 * 48 * 4
    assert estimate.work == "250 tokens"


@pytest.mark.parametrize(
    ("changes", "operations"),
    [({}, 6), ({"gradient_checkpointing": True}, 8), ({"lora": LoRAConfig(rank=2)}, 4)],
)
def test_training_costs_six_operations_four_with_lora_and_two_more_with_gradient_checkpointing(
    small: PlannedModel, large: PlannedModel, changes: dict[str, object], operations: int
) -> None:
    """Three epochs of 10 responses in batches of 4 are nine steps; the teacher's head computes 150 response tokens."""
    config = TrainConfig(batch_size=4, epochs=3, save_steps=8, **changes)
    estimate = estimates.estimate_train(small, [(large, 1.0)], WORKLOAD, config, "float32", COMPUTE_BOUND)
    assert estimate.work == "9 steps of 4"
    flops = operations * MULTIPLIED * 750 + 2 * 272 * 48 * 150
    assert estimate.seconds == pytest.approx(flops / 1e6)
    # Adapters for q, k, v, o, gate, up and down in two layers.
    trained_weights = 2 * 2 * (64 + 48 + 48 + 64 + 3 * 96) if "lora" in changes else STUDENT
    assert estimate.disk == 4 * trained_weights
    assert estimate.temporary_disk == 2 * 12 * trained_weights  # steps 8 and 9 are saved


def test_a_method_that_selects_from_whole_steps_reads_them_twice(small: PlannedModel, large: PlannedModel) -> None:
    once, twice = (
        estimates.estimate_train(
            small, [(large, 1.0)], WORKLOAD, TrainConfig(batch_size=4, epochs=1, method=name), "float32", COMPUTE_BOUND
        ).seconds
        for name in ("se-kd", "tip")
    )
    assert twice - once == pytest.approx((2 * MULTIPLIED * 250 + 2 * 272 * 48 * 50) / 1e6)


@pytest.mark.parametrize(("fractions", "teachers_forwards"), [([1.0], 2), ([0.6, 0.4], 1)])
def test_an_only_loaded_teacher_reads_whole_steps_twice_and_several_once(
    small: PlannedModel, large: PlannedModel, fractions: list[float], teachers_forwards: int
) -> None:
    online = OnlineConfig(sampling=GenerateConfig(engine="transformers"))
    once, twice = (
        estimates.estimate_train(
            small,
            [(large, fraction) for fraction in fractions],
            WORKLOAD,
            TrainConfig(batch_size=4, epochs=1, method=name, online=online),
            "float32",
            COMPUTE_BOUND,
        ).seconds
        for name in ("se-kd", "tip")
    )
    more = 2 * MULTIPLIED * 250 + (teachers_forwards - 1) * 2 * TEACHER * 250
    assert twice - once == pytest.approx(more / 1e6)


def test_online_training_adds_sampling_and_the_teachers_forward_pass(small: PlannedModel, large: PlannedModel) -> None:
    offline = TrainConfig(batch_size=4, epochs=1)
    online = TrainConfig(batch_size=4, epochs=1, online=OnlineConfig(sampling=GenerateConfig(engine="transformers")))
    offline_seconds, online_seconds = (
        estimates.estimate_train(small, [(large, 1.0)], WORKLOAD, config, "float32", COMPUTE_BOUND).seconds
        for config in (offline, online)
    )
    teacher_flops = 2 * TEACHER * 250 - 2 * 272 * 48 * 50
    steps = 3 * 5 * 4  # ten responses, four at a time, five tokens
    sampling_flops = 2 * MULTIPLIED * (10 * 20 + steps)
    assert online_seconds - offline_seconds == pytest.approx((teacher_flops + sampling_flops) / 1e6)


def test_a_teacher_mixed_policy_adds_the_teachers_sampling(small: PlannedModel, large: PlannedModel) -> None:
    student, mixed = (
        TrainConfig(batch_size=4, online=OnlineConfig(sampling=GenerateConfig(engine="transformers", policy=policy)))
        for policy in ("student", "teacher-mixed")
    )
    student_seconds, mixed_seconds = (
        estimates.estimate_train(small, [(large, 1.0)], WORKLOAD, config, "float32", MEMORY_BOUND).seconds
        for config in (student, mixed)
    )
    assert mixed_seconds > 2 * student_seconds


def test_decoding_is_bound_by_compute_or_by_memory(small: PlannedModel) -> None:
    """Ten responses of five tokens, four at a time, are 15 steps; each moves the weights and four caches of 22.5."""
    config = GenerateConfig(engine="transformers", batch_size=4)
    estimate = estimates.estimate_generate([(small, 1.0)], WORKLOAD, config, COMPUTE_BOUND)
    assert estimate.seconds == pytest.approx(2 * MULTIPLIED * (200 + 15 * 4) / 1e6)
    cached = 2 * 2 * 2 * 8 * 4  # keys and values, two layers, two heads of 8, float32
    estimate = estimates.estimate_generate([(small, 1.0)], WORKLOAD, config, MEMORY_BOUND)
    assert estimate.seconds == pytest.approx(15 * (4 * MULTIPLIED + 4 * 22.5 * cached) / 1e6, rel=1e-6)
    assert estimate.memory == 4 * STUDENT + 4 * small.sequence_bytes("float32", 30, 1)


def test_two_fractions_cost_less_than_both_models_in_full(small: PlannedModel, large: PlannedModel) -> None:
    def seconds(*fractions: float) -> float:
        config = GenerateConfig(engine="transformers", policy="mixed", batch_size=1)
        return estimates.estimate_generate(
            [*zip((small, large), fractions, strict=True)], WORKLOAD, config, COMPUTE_BOUND
        ).seconds

    assert seconds(0.5, 0.5) == pytest.approx((seconds(1, 0) + seconds(0, 1)) / 2)
    assert seconds(1, 1) == pytest.approx(seconds(1, 0) + seconds(0, 1))


def test_eval_reads_choices_and_generates_responses_up_to_a_limit(small: PlannedModel) -> None:
    def seconds(task: str, held_out: Workload | None = None, **settings: object) -> float:
        config = EvalConfig(tasks=(task,), limit=6, batch_size=3, **settings)
        return estimates.estimate_eval([small, small], held_out, config, COMPUTE_BOUND).seconds

    tokens = benchmark_length(BENCHMARKS["sciq"])[1]
    assert seconds("sciq") == pytest.approx(2 * 2 * MULTIPLIED * 6 * tokens / 1e6)
    tokens = benchmark_length(BENCHMARKS["mbpp"])[1]
    assert seconds("mbpp", max_new_tokens=10) == pytest.approx(2 * 2 * MULTIPLIED * 6 * (tokens + 10) / 1e6)
    assert seconds("mbpp", samples=4, temperature=0.6) == pytest.approx(4 * seconds("mbpp"))
    tokens = benchmark_length(BENCHMARKS["aime24"])[1] + 32_768
    assert seconds("aime24") == pytest.approx(2 * 2 * MULTIPLIED * 6 * 16 * tokens / 1e6)
    assert seconds("sciq", WORKLOAD) - seconds("sciq") == pytest.approx(2 * 2 * MULTIPLIED * 250 / 1e6)


def test_every_benchmark_has_a_length() -> None:
    assert all(min(benchmark_length(benchmark)) > 0 for benchmark in BENCHMARKS.values())


def test_lengths_equal_the_real_datasets(real_data: Path) -> None:
    """For the benchmarks whose evaluated split is complete in `real_data`."""
    import pyarrow.parquet as pq

    splits = {"gsm8k": "test", "sciq": "test", "mbpp": "test", "ifeval": "train", "math": "test", "bbh": "test"}
    for name, split in splits.items():
        files = (real_data / "benchmarks" / name).rglob(f"{split}.parquet")
        assert sum(pq.read_metadata(file).num_rows for file in files) == benchmark_length(BENCHMARKS[name])[0]


def test_rates_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of 2 x 8 x 8 x 8 operations and a copy of 100 bytes take a tenth of a second each."""
    clock = iter(range(1000))
    monkeypatch.setattr(rates, "MATRIX_SIDE", {"cpu": 8})
    monkeypatch.setattr(rates, "COPY_BYTES", {"cpu": 100})
    monkeypatch.setattr("tsdkd.stages.plan.rates.time.perf_counter", lambda: next(clock) / 10)
    monkeypatch.setattr(rates, "default_device", lambda: "cpu")
    measured = rates.measure_rates()
    assert (measured.flops_per_second, measured.bytes_per_second) == (pytest.approx(10_240), pytest.approx(2_000))


def test_each_of_several_teachers_reads_its_own_responses_and_is_loaded_alone(
    small: PlannedModel, large: PlannedModel
) -> None:
    """30 of the 50 response tokens have a teacher of width 32, 20 one of width 48."""
    teachers = [(small, 0.6), (large, 0.4)]
    estimate = estimates.estimate_score(small, teachers, WORKLOAD, ScoreConfig(k=10), COMPUTE_BOUND)
    assert estimate.seconds == pytest.approx(2 * (1.6 * MULTIPLIED + 0.4 * TEACHER) * 250 / 1e6)
    assert estimate.disk == 30 * (16 + 60 + 128) + 264 * 32 * 4 + 20 * (16 + 60 + 192) + 272 * 48 * 4
    alone = estimates.estimate_score(small, [(large, 1.0)], WORKLOAD, ScoreConfig(k=10), COMPUTE_BOUND)
    assert estimate.memory - 2 * estimate.disk == alone.memory - 2 * alone.disk
    config = GenerateConfig(policy="speculative", engine="transformers")
    joint = [(small, 1.0), *teachers]
    memory = estimates.estimate_generate(joint, WORKLOAD, config, COMPUTE_BOUND).memory
    assert memory == estimates.estimate_generate([(small, 1.0), (large, 1.0)], WORKLOAD, config, COMPUTE_BOUND).memory


def test_the_fractions_of_teachers_are_counted_by_name_else_by_source() -> None:
    by_name = replace(WORKLOAD, teachers={"a": 3, "b": 1}, sources={"a": 2, "c": 2})
    assert by_name.teacher_fractions(["a", "b", "c"]) == [0.75, 0.25, 0]
    assert replace(by_name, teachers={"": 4}).teacher_fractions(["a", "c"]) == [0.5, 0.5]
    assert replace(by_name, teachers={"": 4}).teacher_fractions([""]) == [1]
    assert WORKLOAD.teacher_fractions(["a", "b"]) == [0.5, 0.5]


def test_training_keeps_the_heads_of_all_teachers_or_loads_one_teacher_at_a_time(
    small: PlannedModel, large: PlannedModel
) -> None:
    def memory(config: TrainConfig, *teachers: PlannedModel) -> int:
        fractions = [(teacher, 1 / len(teachers)) for teacher in teachers]
        return estimates.estimate_train(small, fractions, WORKLOAD, config, "float32", COMPUTE_BOUND).memory

    offline, online = TrainConfig(), TrainConfig(online=OnlineConfig(sampling=GenerateConfig(engine="transformers")))
    assert memory(offline, small, large) - memory(offline, large) == 264 * 32 * 2
    assert memory(online, small, large) == memory(online, large) > memory(online, small)
