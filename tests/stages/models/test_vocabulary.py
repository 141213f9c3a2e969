"""The ids that a model knows, and the ids that two models share."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.models import byte_tokenizer, save_tiny_model
from tests.helpers.training import CONFIG as TRAIN
from tsdkd.errors import InputError
from tsdkd.stages.config.eval import EvalConfig
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.config.train import OnlineConfig
from tsdkd.stages.data.offline import OfflineSource
from tsdkd.stages.eval.stage import _measure_held_out
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.inspect.models import score_with_models
from tsdkd.stages.models.load import load_model
from tsdkd.stages.models.spec import load_spec
from tsdkd.stages.models.vocabulary import known_vocab, require_known_ids
from tsdkd.stages.observer import SilentObserver
from tsdkd.stages.score.stage import score
from tsdkd.stages.train.stage import train_offline, train_online

CONFIG = GenerateConfig(max_new_tokens=5, limit=4)
PADDING = ("<|padding|>",)
"""The id of a token that only the tokenizer has: the heads of the models have 258 rows."""


@pytest.fixture(scope="module")
def short_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("m") / "student", seed=1, padding_rows=-1, extra=PADDING)


@pytest.fixture(scope="module")
def long_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("m") / "teacher", seed=2, width=48, padding_rows=5, extra=PADDING)


def test_a_model_knows_the_ids_of_its_tokenizer_that_have_rows() -> None:
    """Rows may exceed the tokenizer; the tokenizer may exceed the rows by added tokens, and by no others."""
    tokenizer = byte_tokenizer(PADDING)
    assert [known_vocab("m", tokenizer, rows) for rows in (300, 259, 258, 256)] == [259, 259, 258, 256]
    with pytest.raises(InputError, match=r"tokenizer of m has 259 ids, but the model's head has 255 rows"):
        known_vocab("m", tokenizer, 255)
    require_known_ids("m", 258, 257)
    with pytest.raises(InputError, match=r"contain the id 258, but m knows the ids below 258"):
        require_known_ids("m", 258, 258)


def test_every_stage_cuts_both_models_to_the_ids_that_they_share(
    short_student: Path, long_teacher: Path, prompts: Path, tmp_path: Path
) -> None:
    student, teacher = str(short_student), str(long_teacher)
    assert (load_spec(student).vocab, load_model(student).vocab, load_model(student).padding_ids) == (258, 258, [])
    assert (load_spec(teacher).vocab, load_model(teacher).vocab) == (259, 259)
    rollouts = generate(
        prompts, student, tmp_path / "rollouts", replace(CONFIG, policy="mixed"), teachers={"": teacher}
    )
    scores = score(rollouts.path, student, teacher, tmp_path / "scores", ScoreConfig(k=4))
    config = replace(TRAIN, epochs=1)
    train_offline(rollouts.path, scores.path, student, tmp_path / "offline", config)
    online = OnlineConfig(sampling=replace(CONFIG, limit=4), student_fraction=1.0)
    train_online(prompts, student, teacher, tmp_path / "online", replace(config, online=online))
    source = OfflineSource(rollouts.path, scores.path)
    assert source.decoder.vocab == 258
    assert _measure_held_out(load_model(teacher), source, EvalConfig(), SilentObserver())["kl"] == pytest.approx(0)
    score_with_models(rollouts.table().to_pylist()[0], [student], teacher, ScoreConfig(k=4), SilentObserver())


def test_a_prompt_with_an_unknown_id_is_refused_before_anything_is_written(
    short_student: Path, long_teacher: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a<|padding|>b"}\n')
    arguments = tmp_path / "prompts.jsonl", str(short_student), tmp_path / "r"
    with pytest.raises(InputError, match="contain the id 258"):
        generate(*arguments, CONFIG)
    rollouts = generate(
        tmp_path / "prompts.jsonl",
        None,
        tmp_path / "t",
        replace(CONFIG, policy="teacher"),
        teachers={"": str(long_teacher)},
    )
    with pytest.raises(InputError, match="contain the id 258"):
        score(rollouts.path, str(short_student), str(long_teacher), tmp_path / "r", ScoreConfig())
    assert not (tmp_path / "r").exists()
