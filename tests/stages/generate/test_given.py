"""generate --policy given: conversations become rollouts; training on them equals training on their turns."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.chat_templates import CONVERSATIONS
from tests.helpers.models import save_tiny_model
from tests.helpers.training import RecordingObserver, learn, metrics, same_update, weights
from tsdkd.artifacts.manifest import ArtifactKind, load_manifest
from tsdkd.artifacts.reader import read_artifact
from tsdkd.core import TSDKDConfig, token_selective_loss_from_hidden
from tsdkd.errors import InputError
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.inspect import InspectConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.config.train import LoRAConfig, OnlineConfig, TrainConfig
from tsdkd.stages.data.batches import predicting_hidden
from tsdkd.stages.data.online import OnlineSource, samples_from_rollouts
from tsdkd.stages.data.online_teachers import LoadedTeacher
from tsdkd.stages.data.requests import Request, Response
from tsdkd.stages.data.scoring import score_responses
from tsdkd.stages.data.source import Sample, collate, turns_as_samples
from tsdkd.stages.data.turns import response_turns
from tsdkd.stages.generate import stage
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.inspect.stage import inspect_all, inspect_models, inspect_scores
from tsdkd.stages.methods import find_method
from tsdkd.stages.metrics.health import response_health
from tsdkd.stages.models.language_model import LanguageModel
from tsdkd.stages.models.load import load_model
from tsdkd.stages.score.stage import score
from tsdkd.stages.train.stage import train_offline, train_online

CONFIG = GenerateConfig(policy="given", part_size=2)
CALL = [{"type": "function", "function": {"name": "sum", "arguments": {"a": 2}}}]
TOOLS = [{"type": "function", "function": {"name": "sum", "parameters": {"properties": {}}}}]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


ROWS: list[dict[str, Any]] = [
    {"messages": [user("Hi?"), assistant("Hello."), user("2 + 2?"), assistant("It is four.")]},
    {
        "messages": [
            user("Sum 2?"),
            assistant("", tool_calls=CALL),
            {"role": "tool", "content": "2"},
            assistant("Two."),
            user("Sure?"),
            assistant("Yes, I am."),
        ],
        "tools": TOOLS,
    },
    {"messages": [user("Only a question")]},
    {"conversations": [{"from": "human", "value": "Name?"}, {"from": "gpt", "value": "Bot."}]},
    {"prompt": "Say a", "response": "aaa"},
    {"prompt": [user("Say b")], "completion": [assistant("bb")]},
    {"messages": [user("Hi?"), assistant("Good day.")]},
    {"messages": [user("Hi?"), assistant("Good day.")]},
    {"messages": [user("x" * 300), assistant("Long.")]},
]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Student and teacher with a chat template that writes tools and tool calls."""
    names = []
    for name, seed, layers in (("student", 2, 2), ("teacher", 1, 3)):
        path = save_tiny_model(tmp_path_factory.mktemp("pair") / name, seed=seed, layers=layers)
        (path / "chat_template.jinja").write_text(CONVERSATIONS["chatml"])
        names.append(str(path))
    return names[0], names[1]


@pytest.fixture(scope="module")
def run(pair: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("given")
    prompts = write_rows(directory / "rows.jsonl", ROWS)
    generate(prompts, pair[0], directory / "rollouts", replace(CONFIG, max_prompt_tokens=250))
    score(directory / "rollouts", *pair, directory / "scores", ScoreConfig(k=4))
    return directory


def rows_of(run: Path, kind: ArtifactKind = "rollouts") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_artifact(run / kind, kind).table().to_pylist()
    return rows


def split_into_turns(row: Sample) -> list[Sample]:
    """Split a rollout into one rollout per turn; the prompt of each is everything before the turn."""
    return [
        {
            "sample_id": f"{row['sample_id']}.{turn.start}",
            "prompt_ids": row["prompt_ids"] + row["response_ids"][: turn.start],
            "response_ids": row["response_ids"][turn.start : turn.stop],
        }
        for turn in response_turns(len(row["response_mask"]), row["response_mask"])
    ]


def test_rows_of_every_schema(run: Path, pair: tuple[str, str]) -> None:
    rows = rows_of(run)
    assert [row["response"] for row in rows] == [
        "Hello.\n[context: user\n2 + 2?\nassistant]\nIt is four.",
        "Two.\n[context: user\nSure?\nassistant]\nYes, I am.",
        "Bot.",
        "aaa",
        "bb",
        "Good day.",
    ]
    assert {(row["author"], row["finish_reason"], row["teacher_tokens"]) for row in rows} == {("given", "stop", 0)}
    assert [message["role"] for message in rows[1]["messages"]] == ["user", "assistant", "tool"]
    assert rows[0]["prompt_id"] == rows[5]["prompt_id"]  # the same prompt, whatever its responses are
    assert len({row["sample_id"] for row in rows}) == 6
    manifest = load_manifest(run / "rollouts")
    assert [model.role for model in manifest.models] == ["student"]
    learned, total = sum(sum(row["response_mask"]) for row in rows), sum(len(row["response_mask"]) for row in rows)
    assert manifest.summary == {
        "prompts": 6,
        "prompts_skipped": {"no_turn": 1, "duplicate": 1, "too_long": 1},
        "responses": 6,
        "turns": 8,
        "turns_skipped": {},
        "split_conversations": 0,
        "response_tokens": learned,
        "context_tokens": total - learned,
        "teacher_tokens": 0,
        "truncated": 0,
    }


def test_a_conversation_has_the_scores_of_its_turns(run: Path, pair: tuple[str, str]) -> None:
    models = load_model(pair[0]), load_model(pair[1])
    for row, recorded in zip(rows_of(run), rows_of(run, "scores"), strict=True):
        turns = [
            scores for turn in split_into_turns(row) for scores in score_responses([turn], models, ScoreConfig(k=4))
        ]
        for name in ("student_entropy", "teacher_entropy", "student_log_prob", "teacher_log_prob"):
            torch.testing.assert_close(torch.tensor(recorded[name]), torch.cat([scores[name] for scores in turns]))
        candidates = [token for scores in turns for token in scores["candidates"].flatten().tolist()]
        assert recorded["candidates"] == candidates


@pytest.mark.parametrize("method", ["tsdkd", "gkd", "supervised-kd"])
def test_a_conversation_trains_as_its_turns_do(run: Path, pair: tuple[str, str], method: str) -> None:
    """Value and every gradient are those of the turns as rollouts of their own, but for norms and RoPE in float32."""
    student, teacher = (as_float64(load_model(name)) for name in pair)
    rows = rows_of(run)[:3]
    objective = replace(find_method(method).objective, k=4) if method == "tsdkd" else find_method(method).objective
    whole = loss_and_gradients(rows, student, teacher, objective)
    split = loss_and_gradients([turn for row in rows for turn in split_into_turns(row)], student, teacher, objective)
    for one, other in zip(whole, split, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
    assert all(gradient.abs().max() > 0 for gradient in whole[1:])


def as_float64(model: LanguageModel) -> LanguageModel:
    model.model.double()
    return model


class NoSampler:
    def sample(self, student: LanguageModel, requests: list[Request]) -> list[Response]:
        raise AssertionError("given responses are not sampled")


def loss_and_gradients(
    samples: list[Sample], student: LanguageModel, teacher: LanguageModel, objective: TSDKDConfig
) -> list[torch.Tensor]:
    source = OnlineSource(samples, LoadedTeacher(teacher), NoSampler(), student_fraction=0.0)
    batch = collate(samples, source)
    student.model.zero_grad()
    loss, _ = token_selective_loss_from_hidden(
        predicting_hidden(student, batch), student.head, source.signal(batch), batch["response_mask"], objective
    )
    loss.backward()
    return [loss.detach(), *(weight.grad for weight in student.model.parameters() if weight.grad is not None)]


TRAIN = TrainConfig(
    method="supervised-kd",
    objective=find_method("supervised-kd").objective,
    epochs=1,
    batch_size=6,
    micro_batch_size=3,
    precision="float32",
    warmup_ratio=0,
)


def test_offline_training_reads_the_masks(run: Path, pair: tuple[str, str], tmp_path: Path) -> None:
    """The loss of the first step is that of the turns; lengths and repetitions are those of turns."""
    train_offline(run / "rollouts", run / "scores", pair[0], tmp_path / "c", TRAIN)
    (step,) = [json.loads(line) for line in (tmp_path / "c" / "metrics.jsonl").read_text().splitlines()]
    student, teacher = load_model(pair[0]), load_model(pair[1])
    turns = [turn for row in rows_of(run) for turn in split_into_turns(row)]
    expected = loss_and_gradients(turns, student, teacher, TRAIN.objective)[0]
    assert step["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert step["response_length"] == pytest.approx(sum(len(turn["response_ids"]) for turn in turns) / len(turns))


def test_given_responses_need_no_teacher_for_cross_entropy(run: Path, pair: tuple[str, str], tmp_path: Path) -> None:
    config = replace(TRAIN, method="seqkd", objective=find_method("seqkd").objective, held_out=0.8, eval_steps=1)
    artifact = train_offline(run / "rollouts", None, pair[0], tmp_path / "c", config)
    assert [model.role for model in artifact.manifest.models] == ["student"]
    assert "from given responses" in (tmp_path / "c" / "README.md").read_text()


@pytest.mark.parametrize("method", ["minillm", "skd"])
def test_methods_of_sampled_responses_refuse_given_ones(
    run: Path, pair: tuple[str, str], tmp_path: Path, method: str
) -> None:
    config = replace(TRAIN, method=method, objective=find_method(method).objective)
    with pytest.raises(InputError, match=f"{method} does not learn from responses by given"):
        train_offline(run / "rollouts", run / "scores", pair[0], tmp_path / "c", config)


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=2, merge=True)], ids=["full", "lora"])
def test_packed_conversations_give_the_update_of_padded_ones(
    run: Path, pair: tuple[str, str], tmp_path: Path, lora: LoRAConfig | None
) -> None:
    """Masks, prompts and turns of many lengths; the last optimizer batch is smaller."""
    config = replace(TRAIN, batch_size=5, precision="float32", learning_rate=1e-3, epochs=2, lora=lora)
    packed = replace(config, micro_batch_size=None, micro_batch_tokens=300, gradient_checkpointing=True)
    padded = replace(config, micro_batch_size=5)
    expected, found = (
        learn(run, Path(pair[0]), tmp_path / name, each) for name, each in (("padded", padded), ("packed", packed))
    )
    assert len(rows_of(run)) % 5
    assert same_update(found, expected, weights(Path(pair[0])))
    one, other = (metrics(tmp_path / name) for name in ("packed", "padded"))
    assert [step["response_length"] for step in one] == pytest.approx([step["response_length"] for step in other])


def test_online_training_keeps_masks_and_samples_without(run: Path, pair: tuple[str, str], tmp_path: Path) -> None:
    """Recorded responses keep their masks; a new response is one turn."""
    rollouts = read_artifact(run / "rollouts", "rollouts")
    samples = samples_from_rollouts(rollouts, None)
    assert [sample["response_mask"] for sample in samples] == [row["response_mask"] for row in rows_of(run)]

    class Sampler:
        def update(self, student: LanguageModel, requests: list[Any]) -> None:
            pass

        def sample(self, requests: list[Any]) -> list[Response]:
            return [Response([*[5] * 80, 257], "stop") for _ in requests]

    teacher = load_model(pair[1])
    sampled = OnlineSource(samples, LoadedTeacher(teacher), Sampler(), 1.0).with_responses(samples, teacher, (0,))
    assert {len(turns_as_samples(sample)) for sample in sampled} == {1}
    assert collate(sampled, OnlineSource(sampled, LoadedTeacher(teacher), Sampler(), 1.0))[
        "response_mask"
    ].sum() == 81 * len(samples)
    config = replace(TRAIN, method="gkd", objective=find_method("gkd").objective)
    online = replace(config, online=OnlineConfig(student_fraction=0.5, sampling=GenerateConfig(max_new_tokens=4)))
    train_online(run / "rollouts", *pair, tmp_path / "online", online)


def test_each_turn_has_a_health_of_its_own() -> None:
    """Only the last turn can be truncated, and repetitions count within a turn."""
    ids = [1, 2, 3, 4, 0, *[7] * 12]
    sample = {"sample_id": "a", "prompt_id": "a", "author": "given", "response_ids": ids}
    sample |= {"response_mask": [i != 4 for i in range(17)]}
    turns = turns_as_samples(sample | {"finish_reason": "length"})
    assert [turn["response_ids"] for turn in turns] == [[1, 2, 3, 4], [7] * 12]
    assert response_health(turns) == {"truncated": 0.5, "repeating": 0.5}


def test_inspection_selects_within_each_turn(run: Path, pair: tuple[str, str]) -> None:
    """Context is shown and not selected; the models that read the response now select alike."""
    row = rows_of(run)[1]
    config = InspectConfig(sample_id=row["sample_id"], k=4)
    response = inspect_scores(run / "scores", config)
    first, second = response_turns(len(row["response_mask"]), row["response_mask"])
    assert [token.position - 1 for token in response.tokens] == [*first, *second]
    tokens = {token.position - 1: token for token in response.tokens}
    assert tokens[second.start].context == "\n<|start|>user\nSure?<|end|>\n<|start|>assistant\n"
    assert sum(bool(token.context) for token in response.tokens) == 1
    for turn in (first, second):
        assert tokens[turn.start].in_opener
        assert sum(tokens[i].ends_opener for i in turn) == 1
        assert any(tokens[i].in_entropy_term for i in turn)
    assert dict(response.summary)["tokens"].startswith(f"{len(tokens)} in 2 turns, with {second.start - first.stop} of")
    loaded = inspect_models(run / "rollouts", config, *pair)
    assert [(t.position, t.in_opener, t.in_entropy_term) for t in loaded.tokens] == [
        (t.position, t.in_opener, t.in_entropy_term) for t in response.tokens
    ]


@pytest.mark.parametrize("opener", [0.3, "adaptive"])
def test_aggregates_count_positions_within_turns(run: Path, opener: Any) -> None:
    aggregate = inspect_all(run / "scores", InspectConfig(k=4, opener=opener))
    rows = rows_of(run)
    lengths = [len(turn) for row in rows for turn in response_turns(len(row["response_mask"]), row["response_mask"])]
    assert (aggregate.responses, aggregate.turns, aggregate.tokens) == (len(rows), len(lengths), sum(lengths))
    assert aggregate.responses_by_position.tolist() == [
        sum(length > position for length in lengths) for position in range(max(lengths))
    ]
    responses = [
        inspect_scores(run / "scores", InspectConfig(sample_id=r["sample_id"], k=4, opener=opener)) for r in rows
    ]
    openers = sum(length * count for length, count in aggregate.opener_lengths.items())
    assert openers == sum(response.opener_length for response in responses)
    fractions = [fraction for response in responses for fraction in response.opener_fractions]
    assert sorted(aggregate.opener_fractions.elements()) == sorted(fractions)


def test_an_interrupted_run_ends_with_the_same_bytes(
    run: Path,
    pair: tuple[str, str],
    tmp_path: Path,
    contents: Callable[[Path], dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write, config = stage.Writer.write_table, replace(CONFIG, max_prompt_tokens=250)

    def interrupted(self: stage.Writer, file: str, *args: object) -> None:
        if file == "part-00001.parquet":
            raise KeyboardInterrupt
        write(self, file, *args)

    monkeypatch.setattr(stage.Writer, "write_table", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(run / "rows.jsonl", pair[0], tmp_path / "cut", config)
    assert len(list((tmp_path / "cut").glob("*.parquet"))) == 1
    monkeypatch.undo()
    generate(run / "rows.jsonl", pair[0], tmp_path / "cut", config)
    generate(run / "rows.jsonl", pair[0], tmp_path / "whole", config)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_split_conversation_is_reported(pair: tuple[str, str], tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", seed=2)
    (model / "chat_template.jinja").write_text(CONVERSATIONS["thoughts"])
    observer = RecordingObserver()
    rows = write_rows(tmp_path / "rows.jsonl", ROWS[:1])
    artifact = generate(rows, str(model), tmp_path / "r", CONFIG, observer=observer)
    table = artifact.table().to_pylist()
    assert [row["sample_id"][-2:] for row in table] == ["-0", "-1"]
    assert table[0]["prompt_id"] == table[1]["prompt_id"]
    assert artifact.manifest.summary["split_conversations"] == 1
    assert any("1 conversations are split" in warning for warning in observer.warnings)


def test_a_named_response_column_follows_the_messages(pair: tuple[str, str], tmp_path: Path) -> None:
    """As in UltraInteract's pairs: a trajectory that ends with the user, and the chosen response."""
    trajectory = [{"from": "user", "value": "Solve."}, {"from": "assistant", "value": "Try 1."}]
    row = {"trajectory": [*trajectory, {"from": "user", "value": "Wrong."}], "chosen": "Right.", "rejected": "No."}
    rows = write_rows(tmp_path / "rows.jsonl", [row])
    config = replace(CONFIG, column="trajectory", response_column="chosen", turns="last")
    (rollout,) = generate(rows, pair[0], tmp_path / "r", config).table().to_pylist()
    assert rollout["response"] == "Right."
    assert [message["content"] for message in rollout["messages"]] == ["Solve.", "Try 1.", "Wrong."]


def test_rows_without_any_response_are_refused(pair: tuple[str, str], tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "Hi?", "answer": "Hello."}])
    with pytest.raises(InputError, match="1 without a text of the assistant to learn") as error:
        generate(rows, pair[0], tmp_path / "r", CONFIG)
    assert "--response-column" in error.value.remedy
    assert not (tmp_path / "r").exists()


def test_a_conversation_must_fit_the_models_context(pair: tuple[str, str], tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "Hi?", "response": "x" * 600}])
    with pytest.raises(InputError, match="reads 512"):
        generate(rows, pair[0], tmp_path / "r", replace(CONFIG, max_new_tokens=600))
    (row,) = generate(rows, pair[0], tmp_path / "r", replace(CONFIG, max_new_tokens=50)).table().to_pylist()
    assert (len(row["response_ids"]), row["finish_reason"]) == (50, "length")


@pytest.mark.parametrize("changes", [{"temperature": 0.5}, {"samples_per_prompt": 2}, {"engine": "transformers"}])
def test_options_of_sampling_are_refused(pair: tuple[str, str], tmp_path: Path, changes: dict[str, Any]) -> None:
    (name,) = changes
    with pytest.raises(InputError, match=f"--{name.replace('_', '-')} has no effect on --policy given"):
        generate(tmp_path / "rows.jsonl", pair[0], tmp_path / "r", replace(CONFIG, **changes))
    with pytest.raises(InputError, match="--turns has no effect on --policy student"):
        generate(tmp_path / "rows.jsonl", pair[0], tmp_path / "r", GenerateConfig(turns="last"))
