"""generate: rollouts hold what the model samples, and an interrupted run ends with the same bytes."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.helpers.models import copy_with_ends
from tests.helpers.training import CONFIG as TRAIN
from tests.helpers.training import RecordingObserver
from tsdkd.errors import InputError
from tsdkd.stages.config.generate import AUTHORS, GenerateConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.config.train import OnlineConfig
from tsdkd.stages.engines import choice, transformers_engine
from tsdkd.stages.generate import stage
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.models.load import load_model
from tsdkd.stages.models.tokenizers import chat_token_ids, load_tokenizer
from tsdkd.stages.score.stage import score
from tsdkd.stages.train.stage import train_offline, train_online

Contents = Callable[[Path], dict[str, bytes]]
CONFIG = GenerateConfig(max_new_tokens=12, batch_size=3, part_size=4)


def test_greedy_is_the_argmax_of_a_bare_forward(student: Path, prompts: Path, tmp_path: Path) -> None:
    """One forward per token, unbatched and unpadded."""
    artifact = generate(prompts, str(student), tmp_path / "r", replace(CONFIG, temperature=0.0))
    model = load_model(str(student), "float32")
    for row in artifact.table().to_pylist()[:4]:
        ids = chat_token_ids(model.tokenizer, row["messages"])
        assert row["prompt_ids"] == ids
        expected: list[int] = []
        while len(expected) < CONFIG.max_new_tokens and not (expected and expected[-1] in model.end_ids):
            with torch.no_grad():
                logits = model.model(torch.tensor([ids + expected])).logits[0, -1]
            expected.append(int(logits[: len(model.tokenizer)].argmax()))
        assert row["response_ids"] == expected


def test_the_end_token_is_kept_and_ends_the_response(student: Path, prompts: Path, tmp_path: Path) -> None:
    """Pad and end token share one id: the first one stays, the others go."""
    artifact = generate(
        prompts, str(student), tmp_path / "r", replace(CONFIG, max_new_tokens=200, samples_per_prompt=4)
    )
    end = load_model(str(student)).tokenizer.eos_token_id
    rows = artifact.table().to_pylist()
    reasons = {row["finish_reason"] for row in rows}
    assert reasons == {"stop", "length"}
    for row in rows:
        ids = row["response_ids"]
        assert row["finish_reason"] == ("stop" if ids[-1] == end else "length")
        assert end not in ids[:-1]
        assert len(ids) == 200 or ids[-1] == end
    summary = artifact.manifest.summary
    assert summary["truncated"] == sum(row["finish_reason"] == "length" for row in rows)
    assert summary["response_tokens"] == sum(len(row["response_ids"]) for row in rows)


def test_padding_rows_of_the_head_are_never_sampled(student: Path, prompts: Path, tmp_path: Path) -> None:
    model = load_model(str(student))
    assert len(model.padding_ids) == 6
    artifact = generate(prompts, str(student), tmp_path / "r", replace(CONFIG, max_new_tokens=60, samples_per_prompt=4))
    sampled = {token for row in artifact.table()["response_ids"].to_pylist() for token in row}
    assert max(sampled) < len(model.tokenizer)


def test_samples_differ_and_seeds_matter(student: Path, prompts: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, samples_per_prompt=2)
    first = generate(prompts, str(student), tmp_path / "a", config, seed=0).table()
    again = generate(prompts, str(student), tmp_path / "b", config, seed=0).table()
    other = generate(prompts, str(student), tmp_path / "c", config, seed=1).table()
    assert first.equals(again)
    assert first["response_ids"] != other["response_ids"]
    assert first["sample_id"].to_pylist()[:2] == [f"{first['prompt_id'][0]}-0", f"{first['prompt_id'][0]}-1"]
    assert first["response_ids"][0] != first["response_ids"][1]


def test_the_generation_config_of_a_model_has_no_effect(student: Path, prompts: Path, tmp_path: Path) -> None:
    """Qwen's sets top-k and a repetition penalty."""
    other = tmp_path / "other"
    shutil.copytree(student, other)
    settings = json.loads((other / "generation_config.json").read_text())
    settings |= {"do_sample": True, "top_k": 1, "repetition_penalty": 5.0, "temperature": 0.01}
    (other / "generation_config.json").write_text(json.dumps(settings))
    plain = generate(prompts, str(student), tmp_path / "a", CONFIG).table()
    changed = generate(prompts, str(other), tmp_path / "b", CONFIG).table()
    assert changed["response_ids"] == plain["response_ids"]


def test_an_interrupted_run_ends_with_the_same_bytes(
    student: Path, prompts: Path, tmp_path: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate(prompts, str(student), tmp_path / "whole", CONFIG)
    sampled = 0

    def interrupted(*args: object) -> object:
        nonlocal sampled
        sampled += 1
        if sampled == 3:  # in the second part
            raise KeyboardInterrupt
        return original(*args)

    original = transformers_engine.sample_responses
    monkeypatch.setattr(transformers_engine, "sample_responses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(prompts, str(student), tmp_path / "cut", CONFIG)
    assert len(list((tmp_path / "cut").glob("*.parquet"))) == 1
    monkeypatch.undo()
    generate(prompts, str(student), tmp_path / "cut", CONFIG)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_long_prompts_are_skipped_and_counted(student: Path, prompts: Path, tmp_path: Path) -> None:
    everything = generate(prompts, str(student), tmp_path / "all", CONFIG).table()["prompt_ids"].to_pylist()
    longest = max(map(len, everything))
    artifact = generate(prompts, str(student), tmp_path / "r", replace(CONFIG, max_prompt_tokens=longest - 1))
    sampled = artifact.table()["prompt_ids"].to_pylist()
    assert max(map(len, sampled)) < longest
    assert artifact.manifest.summary["prompts_skipped"] == {"too_long": 10 - len(sampled)}
    assert len(sampled) < 10
    with pytest.raises(InputError, match="longer than 3 tokens"):
        generate(prompts, str(student), tmp_path / "none", replace(CONFIG, max_prompt_tokens=3))
    assert not (tmp_path / "none").exists()


def test_responses_must_fit_the_models_context(student: Path, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="reads 512"):
        generate(prompts, str(student), tmp_path / "r", replace(CONFIG, max_new_tokens=500))
    assert not (tmp_path / "r").exists()


def test_mixed_rollouts_have_two_authors(
    student: Path, teacher: Path, prompts: Path, tmp_path: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each prompt gets the response of a run by its author alone; an interrupted run resumes."""
    config = replace(CONFIG, policy="mixed", temperature=0.0)
    artifact = generate(prompts, str(student), tmp_path / "mixed", config, teachers={"": str(teacher)})
    alone = {
        policy: generate(prompts, model, tmp_path / policy, replace(config, policy=policy), teachers=teachers)
        .table()
        .to_pylist()
        for policy, model, teachers in (("student", str(student), {}), ("teacher", None, {"": str(teacher)}))
    }
    expected = {(author, row["sample_id"]): row["response_ids"] for author, rows in alone.items() for row in rows}
    rows = artifact.table().to_pylist()
    assert sorted(row["sample_id"] for row in rows) == sorted(row["sample_id"] for row in alone["student"])
    assert {row["author"] for row in rows} == {"student", "teacher"}
    for row in rows:
        assert row["response_ids"] == expected[row["author"], row["sample_id"]]
        assert row["teacher_tokens"] == (len(row["response_ids"]) if row["author"] == "teacher" else 0)
    assert [model.role for model in artifact.manifest.models] == ["student", "teacher"]

    write = stage.Writer.write_table

    def interrupted(self: stage.Writer, file: str, *args: object) -> None:
        if file == artifact.tables[-1].file:  # the teacher's
            raise KeyboardInterrupt
        write(self, file, *args)

    monkeypatch.setattr(stage.Writer, "write_table", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(prompts, str(student), tmp_path / "cut", config, teachers={"": str(teacher)})
    monkeypatch.undo()
    generate(prompts, str(student), tmp_path / "cut", config, teachers={"": str(teacher)})
    assert contents(tmp_path / "cut") == contents(tmp_path / "mixed")


@pytest.mark.parametrize("policy", ["student", "mixed", "speculative", "teacher-mixed"])
def test_a_response_ends_with_an_end_token_of_either_model(
    student: Path, teacher: Path, prompts: Path, tmp_path: Path, policy: str
) -> None:
    """The student ends with each of 20 bytes, the teacher with each of 20 others, a turn of the template with 257.

    A response that is cut holds none of them.
    """
    student_path = copy_with_ends(student, tmp_path / "student", range(20))
    teacher_path = copy_with_ends(teacher, tmp_path / "teacher", [*range(100, 120), 300])  # 300 is no token
    config = replace(CONFIG, policy=policy, samples_per_prompt=3)
    artifact = generate(prompts, str(student_path), tmp_path / "r", config, teachers={"": str(teacher_path)})
    rows, ends = artifact.table().to_pylist(), {*range(20), *range(100, 120), 257}
    for row in rows:
        assert ends.isdisjoint(row["response_ids"][:-1])
        assert row["finish_reason"] == ("stop" if row["response_ids"][-1] in ends else "length")
        assert len(row["response_ids"]) == 12 or row["finish_reason"] == "stop"
    last = {(row["author"], row["response_ids"][-1] < 20) for row in rows if row["finish_reason"] == "stop"}
    assert last == {(author, own) for author in AUTHORS[policy] for own in (True, False)}
    assert [model.role for model in artifact.manifest.models] == ["student", "teacher"]


def test_a_student_that_responds_alone_ends_at_its_own_ends_and_at_the_end_of_a_turn(
    student: Path, teacher: Path, prompts: Path, tmp_path: Path
) -> None:
    """Without --teacher; the teacher that is named records itself, and changes nothing else."""
    base = copy_with_ends(student, tmp_path / "student", range(20))
    config = replace(CONFIG, samples_per_prompt=3, max_new_tokens=40)
    alone = generate(prompts, str(base), tmp_path / "alone", config)
    ends = {row["response_ids"][-1] for row in alone.table().to_pylist() if row["finish_reason"] == "stop"}
    assert 257 in ends
    assert ends <= {*range(20), 257}
    named = generate(prompts, str(base), tmp_path / "named", config, teachers={"": str(teacher)})
    assert named.table() == alone.table()
    assert named.manifest.identity.keys() - alone.manifest.identity.keys() == {"model teacher"}


def test_stop_strings_and_shorter_rollouts_are_recorded_if_they_are_set(
    student: Path, prompts: Path, tmp_path: Path
) -> None:
    whole = generate(prompts, str(student), tmp_path / "whole", replace(CONFIG, temperature=0.0))
    assert not {"stop", "rollout_tokens"} & whole.manifest.config.keys()
    texts = [row["response"] for row in whole.table().to_pylist()]
    stop = next(text[n : n + 2] for text in texts for n in range(2, 8) if text[n : n + 2].isascii())
    config = replace(CONFIG, temperature=0.0, stop=(stop,), rollout_tokens=9)
    cut = generate(prompts, str(student), tmp_path / "cut", config)
    assert (cut.manifest.config["stop"], cut.manifest.config["rollout_tokens"]) == ([stop], 9)
    rows = cut.table().to_pylist()
    assert {row["finish_reason"] for row in rows} == {"stop", "early"}
    assert all(stop in row["response"] or 257 in row["response_ids"] for row in rows if row["finish_reason"] == "stop")
    assert cut.manifest.summary["truncated"] == 0
    assert generate(prompts, str(student), tmp_path / "cut", config).manifest == cut.manifest
    with pytest.raises(InputError, match="stop"):
        generate(prompts, str(student), tmp_path / "cut", replace(config, stop=()))


def test_models_without_an_end_token_respond_up_to_the_limit(
    student: Path, teacher: Path, prompts: Path, tmp_path: Path
) -> None:
    """Every engine of transformers says so, and so does online training; scores and training read the responses."""
    models = []
    for path in (student, teacher):
        endless = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
        models.append(str(copy_with_ends(path, tmp_path / f"{path.name}-model", [], endless)))
    small = replace(CONFIG, limit=4, max_new_tokens=6)
    for policy in ("student", "mixed", "speculative"):
        observer, both = RecordingObserver(), policy != "student"
        rollouts = generate(
            prompts,
            models[0],
            tmp_path / policy,
            replace(small, policy=policy),
            observer=observer,
            teachers={"": models[1]} if both else {},
        )
        assert any("no end token: every response has 6 tokens" in warning for warning in observer.warnings)
        assert {len(ids) for ids in rollouts.table()["response_ids"].to_pylist()} == {6}
        assert set(rollouts.table()["finish_reason"].to_pylist()) == {"length"}
    scores = score(tmp_path / "mixed", *models, tmp_path / "scores", ScoreConfig(k=4))
    train_offline(tmp_path / "mixed", scores.path, models[0], tmp_path / "offline", replace(TRAIN, epochs=1))
    online = replace(TRAIN, epochs=1, online=OnlineConfig(sampling=small, student_fraction=1.0))
    observer = RecordingObserver()
    train_online(prompts, *models, tmp_path / "online", online, observer=observer)
    assert any("The models have no end token" in warning for warning in observer.warnings)


def test_a_prompt_without_any_id_is_skipped_as_empty(student: Path, prompts: Path, tmp_path: Path) -> None:
    """A template may drop a message; a response needs a token before it."""
    shutil.copytree(student, tmp_path / "model")
    tokenizer = load_tokenizer(str(student))
    tokenizer.chat_template = "{{ '' if 'empty' in messages[0]['content'] else 'a' }}"
    tokenizer.save_pretrained(tmp_path / "model")
    prompts.write_text('{"prompt": "empty"}\n{"prompt": "filled"}\n')
    artifact = generate(prompts, str(tmp_path / "model"), tmp_path / "r", CONFIG)
    assert artifact.manifest.summary["prompts_skipped"] == {"empty": 1}
    assert artifact.table()["prompt_ids"].to_pylist() == [tokenizer("a").input_ids]


def test_mixed_needs_one_vocabulary(student: Path, other_family: Path, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="different tokenizers"):
        generate(
            prompts, str(student), tmp_path / "r", replace(CONFIG, policy="mixed"), teachers={"": str(other_family)}
        )


def test_the_engine_is_chosen_and_recorded(
    student: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """auto and the engine that it resolves to are one config; an engine that is not installed is refused."""
    artifact = generate(prompts, str(student), tmp_path / "r", CONFIG)
    assert artifact.manifest.engine == artifact.manifest.config["engine"] == "transformers"
    generate(prompts, str(student), tmp_path / "r", replace(CONFIG, engine="transformers"))
    with pytest.raises(InputError, match="vLLM is not installed"):
        generate(prompts, str(student), tmp_path / "v", replace(CONFIG, engine="vllm"))
    monkeypatch.setattr(choice, "has_vllm", lambda: True)
    assert choice.choose_engine(CONFIG) == "vllm"
    assert choice.choose_engine(replace(CONFIG, policy="speculative")) == "transformers"


@pytest.mark.parametrize("changes", [{"tensor_parallel": 2}, {"quantization": "fp8"}])
def test_options_of_vllm_are_refused_with_transformers(
    student: Path, prompts: Path, tmp_path: Path, changes: dict[str, int | str]
) -> None:
    with pytest.raises(InputError, match="works with vLLM only"):
        generate(prompts, str(student), tmp_path / "r", replace(CONFIG, **changes))
