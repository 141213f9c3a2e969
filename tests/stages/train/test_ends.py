"""A student that ends with another token than its teacher learns the teacher's, and its checkpoint stops there."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.helpers.models import copy_with_ends, save_tiny_model
from tests.helpers.training import CONFIG, SAMPLING
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.config.train import LoRAConfig, OnlineConfig, ReplayConfig
from tsdkd.stages.data.batches import predicted_ids
from tsdkd.stages.data.offline import OfflineSource, RolloutSource
from tsdkd.stages.data.online import OnlineSource
from tsdkd.stages.data.online_teachers import LoadedTeacher
from tsdkd.stages.data.source import Sample, Source, collate
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.methods import find_method
from tsdkd.stages.models.load import load_model
from tsdkd.stages.models.merged import merged_model_directory
from tsdkd.stages.models.spec import load_spec
from tsdkd.stages.score.stage import score
from tsdkd.stages.train.stage import train_offline, train_online

Pair = tuple[Path, Path]
END, BASE_END, TURN_END, TOOL_END = 257, 258, 259, 260
"""Ids of <|end|>, which the template writes, of the base student's end, and of the teacher's two."""
EXTRA = ("<|endoftext|>", "<|eot|>", "<|eom|>")
ALL_ENDS = {END, BASE_END, TURN_END, TOOL_END}
ONLINE = replace(CONFIG, epochs=1, online=OnlineConfig(sampling=SAMPLING))
FORMS = [None, LoRAConfig(rank=2), LoRAConfig(rank=2, merge=True)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A base student, and a teacher with two end tokens and one that is outside the vocabulary."""
    directory = tmp_path_factory.mktemp("pair")
    for name, seed, ends in (("student", 2, [BASE_END]), ("teacher", 1, [TURN_END, TOOL_END, 900])):
        copy_with_ends(save_tiny_model(directory / f"{name}-model", seed=seed, extra=EXTRA), directory / name, ends)
    return directory / "student", directory / "teacher"


@pytest.fixture(scope="module")
def rollouts(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Responses of both models, some of which end with each end token and some of which are cut."""
    directory = tmp_path_factory.mktemp("rollouts")
    prompts = directory / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Count to {i}"}) + "\n" for i in range(12)))
    config = GenerateConfig(policy="mixed", max_new_tokens=12, part_size=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tsdkd.stages.engines.transformers_engine.sample_responses", _with_planted_ends)
        generate(prompts, str(pair[0]), directory / "rollouts", config, teachers={"": str(pair[1])})
    score(directory / "rollouts", *map(str, pair), directory / "scores", ScoreConfig(k=4))
    return directory


def _with_planted_ends(model: object, prompts: list[list[int]], limit: int, *_: object) -> list[list[int]]:
    """Responses of which the first two of a batch end early, and the third with its last allowed token."""
    assert {END, BASE_END, TURN_END, TOOL_END} == {*model.end_ids}
    bodies = [[65 + i] * limit for i in range(len(prompts))]
    endings = [[65, TURN_END], [66, 67, BASE_END], [*[68] * (limit - 1), TOOL_END]]
    return [*endings[: len(prompts)], *bodies[3:]]


def _generation_config(path: Path) -> dict[str, object]:
    return json.loads((path / "generation_config.json").read_text())


@pytest.mark.parametrize("lora", FORMS, ids=["full", "lora", "merged"])
def test_the_checkpoint_ends_with_the_tokens_of_both_models(
    rollouts: Path, pair: Pair, tmp_path: Path, lora: LoRAConfig | None
) -> None:
    """Offline, the scores hold the teacher's; transformers, tsdkd and merged adapters read the file."""
    config = replace(CONFIG, epochs=1, lora=lora)
    train_offline(rollouts / "rollouts", rollouts / "scores", str(pair[0]), tmp_path / "c", config)
    assert _generation_config(tmp_path / "c") == {"eos_token_id": [BASE_END, END, TURN_END, TOOL_END]}
    loaded, spec = load_model(str(tmp_path / "c")), load_spec(str(tmp_path / "c"))
    assert set(loaded.end_ids) == set(spec.end_ids) == ALL_ENDS
    with merged_model_directory(str(tmp_path / "c"), "float32") as directory:
        plain = AutoModelForCausalLM.from_pretrained(directory)
        assert set(plain.generation_config.eos_token_id) == ALL_ENDS
    assert _generation_config(pair[0]) == {"eos_token_id": [BASE_END]}


def test_scores_hold_the_teachers_ends_though_no_response_ends_with_them(
    rollouts: Path, pair: Pair, tmp_path: Path
) -> None:
    generate(rollouts / "prompts.jsonl", str(pair[0]), tmp_path / "r", GenerateConfig(max_new_tokens=1, limit=3))
    score(tmp_path / "r", *map(str, pair), tmp_path / "s", ScoreConfig(k=4))
    source, tokenizer = OfflineSource(tmp_path / "r", tmp_path / "s"), load_spec(str(pair[0])).tokenizer
    assert RolloutSource.end_ids(source, tokenizer) == set()
    assert source.end_ids(tokenizer) == {TURN_END, TOOL_END}


@pytest.mark.parametrize("lora", FORMS[:2], ids=["full", "lora"])
def test_online_training_saves_the_teachers_ends(
    rollouts: Path, pair: Pair, tmp_path: Path, lora: LoRAConfig | None
) -> None:
    train_online(rollouts / "prompts.jsonl", *map(str, pair), tmp_path / "c", replace(ONLINE, lora=lora))
    assert set(load_spec(str(tmp_path / "c")).end_ids) == ALL_ENDS


def test_other_settings_of_the_generation_config_stay(rollouts: Path, pair: Pair, tmp_path: Path) -> None:
    """A student without the file gets the settings that transformers takes from its config."""
    settings = {"temperature": 0.6, "early_stopping": True, "eos_token_id": BASE_END, "unknown": 1}
    student = shutil.copytree(pair[0], tmp_path / "student")
    (student / "generation_config.json").write_text(json.dumps(settings))
    train_offline(rollouts / "rollouts", rollouts / "scores", str(student), tmp_path / "c", replace(CONFIG, epochs=1))
    ends = [BASE_END, END, TURN_END, TOOL_END]
    assert _generation_config(tmp_path / "c") == settings | {"eos_token_id": ends}
    (student / "generation_config.json").unlink()
    train_offline(rollouts / "rollouts", rollouts / "scores", str(student), tmp_path / "d", replace(CONFIG, epochs=1))
    assert set(load_spec(str(tmp_path / "d")).end_ids) == ALL_ENDS
    assert _generation_config(tmp_path / "d")["pad_token_id"] == END


def test_responses_teach_the_ends_of_a_teacher_that_nobody_names(pair: Pair, rollouts: Path, tmp_path: Path) -> None:
    """Without scores: special tokens that end a response; neither the last token of a cut one nor that of a text."""
    source = RolloutSource(rollouts / "rollouts")
    tokenizer = load_spec(str(pair[0])).tokenizer
    assert source.end_ids(tokenizer) == {BASE_END, TURN_END, TOOL_END}
    stopped, teachers = GenerateConfig(policy="teacher", max_new_tokens=30, temperature=0.0), {"": str(pair[1])}
    whole = generate(rollouts / "prompts.jsonl", None, tmp_path / "w", stopped, teachers=teachers)
    texts = [row["response"] for row in whole.table().to_pylist()]
    stop = next(text[n] for text in texts for n in range(2, 20) if text[n].isascii())
    config = replace(stopped, stop=(stop,))
    rows = generate(rollouts / "prompts.jsonl", None, tmp_path / "r", config, teachers=teachers).table().to_pylist()
    assert any(row["finish_reason"] == "stop" and row["response_ids"][-1] < 256 for row in rows)
    assert all(i > 256 for i in RolloutSource(tmp_path / "r").end_ids(tokenizer))
    seqkd = replace(CONFIG, epochs=1, method="seqkd", objective=find_method("seqkd").objective)
    train_offline(tmp_path / "r", None, str(pair[0]), tmp_path / "c", seqkd)
    assert {BASE_END, END} <= set(load_spec(str(tmp_path / "c")).end_ids) <= ALL_ENDS


def _rollouts(path: Path, pair: Pair) -> Source:
    return RolloutSource(path / "rollouts")


def _offline(path: Path, pair: Pair) -> Source:
    return OfflineSource(path / "rollouts", path / "scores")


def _online(path: Path, pair: Pair) -> Source:
    samples: list[Sample] = [*map(RolloutSource(path / "rollouts").__getitem__, range(12))]
    return OnlineSource(samples, LoadedTeacher(load_model(str(pair[1]))), None, 0.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("open_source", [_rollouts, _offline, _online])
def test_a_cut_response_teaches_no_end_and_an_ended_one_does(
    open_source: Callable[[Path, Pair], Source], rollouts: Path, pair: Pair
) -> None:
    """A batch predicts the tokens of the responses alone: no position after the last token of a cut one counts."""
    source = open_source(rollouts, pair)
    samples = [source[i] for i in range(len(source))]
    assert {sample["finish_reason"] for sample in samples} == {"stop", "length"}
    assert any(sample["finish_reason"] == "stop" and len(sample["response_ids"]) == 12 for sample in samples)
    batch = collate(samples, source)
    tokens = [token for sample in samples for token in sample["response_ids"]]
    assert predicted_ids(batch).tolist() == tokens
    assert batch["predicting"].sum() == batch["response_mask"].sum() == len(tokens)
    for sample in samples:
        ends = ALL_ENDS & {*sample["response_ids"]}
        assert (len(ends), sample["response_ids"][-1] in ALL_ENDS) == (
            (1, True) if sample["finish_reason"] == "stop" else (0, False)
        )


@pytest.mark.parametrize("replay", [None, ReplayConfig(phi=1.0, replay_capacity=4)], ids=["online", "replay"])
def test_rollouts_that_are_cut_on_purpose_do_not_count_as_truncated(
    rollouts: Path, pair: Pair, tmp_path: Path, replay: ReplayConfig | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Sample] = []
    with_responses = OnlineSource.with_responses

    def spy(self: OnlineSource, *given: object) -> list[Sample]:
        responses = with_responses(self, *given)
        seen.extend(responses)
        return responses

    monkeypatch.setattr(OnlineSource, "with_responses", spy)
    online = OnlineConfig(
        sampling=replace(SAMPLING, rollout_tokens=5), student_fraction=0.0 if replay else 1.0, replay=replay
    )
    data, changes = rollouts / "prompts.jsonl", {}
    if replay:
        off_policy = GenerateConfig(policy="teacher", max_new_tokens=8)
        recorded = generate(data, None, tmp_path / "r", off_policy, teachers={"": str(pair[1])})
        data, changes = recorded.path, {"method": "distillm", "held_out": 0.5, "eval_steps": 1}
        changes["objective"] = find_method("distillm").objective
    config = replace(CONFIG, epochs=1, online=online, **changes)
    train_online(data, *map(str, pair), tmp_path / "c", config)
    sampled = [sample for sample in seen if sample["finish_reason"] == "early"]
    assert sampled
    assert {len(sample["response_ids"]) for sample in sampled} == {5}
    assert all(ALL_ENDS.isdisjoint(sample["response_ids"]) for sample in sampled)
    if not replay:
        logged = [json.loads(line) for line in (tmp_path / "c" / "metrics.jsonl").read_text().splitlines()]
        assert {step["truncated"] for step in logged} == {0}
    assert (
        json.loads((tmp_path / "c" / "manifest.json").read_text())["config"]["online"]["sampling"]["rollout_tokens"]
        == 5
    )


def test_a_pair_with_the_same_ends_keeps_the_file_of_its_student(student: Path, run: Path, tmp_path: Path) -> None:
    """Nor do its scores record ends. A student without the file gets none."""
    assert "teacher_end_ids" not in json.loads((run / "scores" / "manifest.json").read_text())["config"]
    bare = shutil.copytree(student, tmp_path / "student")
    (bare / "generation_config.json").unlink()
    train_offline(run / "rollouts", run / "scores", str(bare), tmp_path / "c", replace(CONFIG, epochs=1))
    assert not (tmp_path / "c" / "generation_config.json").exists()
    lora = replace(CONFIG, epochs=1, lora=LoRAConfig(rank=2))
    train_offline(run / "rollouts", run / "scores", str(student), tmp_path / "a", lora)
    assert not (tmp_path / "a" / "generation_config.json").exists()
