"""Contexts: sequences that a model cannot read are refused before anything is sampled."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from transformers import AutoConfig

from tests.helpers.training import CONFIG as TRAIN
from tsdkd.artifacts.reader import read_artifact
from tsdkd.errors import InputError
from tsdkd.stages.config.eval import EvalConfig
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.config.train import OnlineConfig
from tsdkd.stages.eval.stage import evaluate
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.inspect.models import score_with_models
from tsdkd.stages.models.context import context_length, require_context
from tsdkd.stages.observer import SilentObserver
from tsdkd.stages.score.stage import score
from tsdkd.stages.train.stage import train_offline, train_online


@dataclass(frozen=True)
class Model:
    name: str
    context: int


MODELS = [Model("student", 100), Model("teacher", 80)]


def test_sequences_that_fit_pass() -> None:
    require_context(MODELS, 80)
    require_context(MODELS, 60, limit=60)


@pytest.mark.parametrize(("tokens", "limit", "name", "context"), [(81, None, "teacher", 80), (61, 60, "student", 60)])
def test_the_model_with_the_shorter_context_is_named(tokens: int, limit: int | None, name: str, context: int) -> None:
    with pytest.raises(InputError, match=f"can reach {tokens} tokens; {name} reads {context}") as caught:
        require_context(MODELS, tokens, limit)
    assert "--max-new-tokens" in caught.value.remedy


def test_recorded_responses_are_refused_with_another_remedy() -> None:
    with pytest.raises(InputError, match="reach 81 tokens; teacher reads 80") as caught:
        require_context(MODELS, 81, recorded=True)
    assert "longer context" in caught.value.remedy


LLAMA = ("llama", {"max_position_embeddings": 128})


@pytest.mark.parametrize(
    ("family", "settings", "context"),
    [
        (*LLAMA, 128),
        ("gpt2", {"n_positions": 32}, 32),
        ("mpt", {"max_seq_len": 64}, 64),
        ("opt", {"max_position_embeddings": 64}, 64),
        ("gemma3", {"text_config": {"max_position_embeddings": 64}}, 64),
        ("bloom", {}, 2**31),
        ("mamba", {}, 2**31),
    ],
)
def test_the_context_comes_from_the_config(family: str, settings: dict[str, object], context: int) -> None:
    """Under the name that a family uses; ALiBi and recurrent models have no limit."""
    assert context_length(AutoConfig.for_model(family, **settings)) == context


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        ({"rope_type": "linear", "factor": 4.0}, 512),
        ({"rope_type": "dynamic", "factor": 2.0}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),  # as Qwen2.5's page says
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),  # as DeepSeek and gpt-oss
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}, 128),
        ({"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 64}, 128),
    ],
)
def test_the_context_includes_rope_scaling(rope: dict[str, object], context: int) -> None:
    family, settings = LLAMA
    config = AutoConfig.for_model(family, **settings)
    config.rope_parameters = rope
    assert context_length(config) == context


def test_gemma3_states_its_scaled_context() -> None:
    config = AutoConfig.for_model("gemma3_text", max_position_embeddings=128)
    config.rope_parameters = {"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": {}}
    assert context_length(config) == 128


def test_stages_refuse_sequences_beyond_a_context(student: Path, prompts: Path, rows: Path, tmp_path: Path) -> None:
    """Rollouts that the student can read are refused for a teacher with a shorter context, and the other way round."""
    short = shutil.copytree(student, tmp_path / "short")
    config = json.loads((short / "config.json").read_text()) | {"max_position_embeddings": 40}
    (short / "config.json").write_text(json.dumps(config))
    rollouts = generate(prompts, str(student), tmp_path / "rollouts", GenerateConfig(max_new_tokens=30, limit=2)).path
    for pair in ((student, short), (short, student)):
        with pytest.raises(InputError, match="short reads 40"):
            score(rollouts, *map(str, pair), tmp_path / "refused", ScoreConfig(k=4))
        rollout = read_artifact(rollouts, "rollouts").table().to_pylist()[0]
        with pytest.raises(InputError, match="short reads 40"):
            score_with_models(rollout, [str(pair[0])], str(pair[1]), ScoreConfig(k=4), SilentObserver())
    scores = score(rollouts, str(student), str(student), tmp_path / "scores", ScoreConfig(k=4)).path
    with pytest.raises(InputError, match="short reads 40"):
        train_offline(rollouts, scores, str(short), tmp_path / "refused", TRAIN)
    for pair in ((student, short), (short, student)):
        online = OnlineConfig(sampling=GenerateConfig(max_new_tokens=30, limit=2), student_fraction=1.0)
        with pytest.raises(InputError, match="short reads 40"):
            train_online(prompts, *map(str, pair), tmp_path / "refused", replace(TRAIN, online=online))
    with pytest.raises(InputError, match="short reads 40"):
        evaluate(str(short), tmp_path / "refused", EvalConfig(tasks=("sciq",)), data=rows, held_out=tmp_path)
    assert not (tmp_path / "refused").exists()
