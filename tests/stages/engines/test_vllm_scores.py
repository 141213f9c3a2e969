"""Real vLLM on a CPU reads student and teacher: one start of both for all tests."""

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.adapters import save_adapter
from tests.helpers.families import tiny
from tests.helpers.training import RecordingObserver
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.data.scoring import score_in_turn, score_responses
from tsdkd.stages.engines.vllm_reader import ReaderPair, open_readers
from tsdkd.stages.models.language_model import LanguageModel, share_vocab
from tsdkd.stages.models.load import load_model

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")

CONFIG = ScoreConfig(engine="vllm", k=4, top_k=8, batch_tokens=2048, dtype="float32", memory_fraction=0.2)
LONGEST = 1100


def make_row(name: str, prompt: list[int], response: list[int], mask: list[bool] | None = None) -> dict[str, Any]:
    return {"sample_id": name, "prompt_ids": prompt, "response_ids": response, "response_mask": mask}


IDS = torch.randint(0, 256, (LONGEST,), generator=torch.Generator().manual_seed(0)).tolist()
BATCHES = [
    [make_row("longest", IDS[:1000], IDS[1000:]), make_row("shared prefix", IDS[:1000], IDS[:20])],
    [
        make_row("one token", IDS[:7], IDS[7:8]),
        make_row("shortest", IDS[:1], IDS[1:2]),
        make_row("twin", IDS[5:300], IDS[300:340]),
        make_row("its twin", IDS[5:300], IDS[300:340]),
        make_row("two turns", IDS[:9], IDS[9:14], [True, True, False, False, True]),
    ],
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An adapter on Llama, and Gemma 2: other norms, a softcap, padding rows and a sliding window."""
    directory = tmp_path_factory.mktemp("models")
    sizes = {"head_dim": 32, "num_attention_heads": 2, "max_position_embeddings": 2048}
    for name, model in (("base", tiny("llama", **sizes)), ("teacher", tiny("gemma2", **sizes, sliding_window=64))):
        for parameter in model.model.parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, std=0.3)  # the norms' weights, which are all equal otherwise
        model.model.save_pretrained(directory / name)
        model.tokenizer.save_pretrained(directory / name)
    return save_adapter(directory / "base", directory / "adapter"), directory / "teacher"


@pytest.fixture(scope="module")
def readers(models: tuple[Path, Path]) -> Iterator[ReaderPair]:
    observer = RecordingObserver()
    sequences = [row["prompt_ids"] + row["response_ids"] for batch in BATCHES for row in batch]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_COMPILE_DISABLE", "1")  # compilation takes half a minute
        student, teacher = map(str, models)
        with open_readers(student, teacher, CONFIG, LONGEST, sequences, observer) as pair:
            assert all("vLLM and transformers differ by 0.000" in message for message in observer.messages)
            yield pair


@pytest.fixture(scope="module")
def loaded(models: tuple[Path, Path]) -> tuple[LanguageModel, LanguageModel]:
    student, teacher = (load_model(str(path), "float32") for path in models)
    return share_vocab(student, teacher)


@pytest.mark.parametrize("signal", ["hidden", "hidden8", "topk", "ranks"])
def test_scores_equal_those_of_transformers(
    readers: ReaderPair, loaded: tuple[LanguageModel, LanguageModel], signal: Any
) -> None:
    config = replace(CONFIG, signal=signal)
    for batch, scored in zip(BATCHES, score_in_turn(BATCHES, readers, config), strict=True):
        for row in batch:
            (expected,) = score_responses([row], loaded, config)
            ours = next(other for other in scored if other["sample_id"] == row["sample_id"])
            assert ours.keys() == expected.keys()
            for name in ours.keys() - {"sample_id", "candidates", "ranks", "top_ids", "hidden"}:
                torch.testing.assert_close(ours[name], expected[name], rtol=1e-3, atol=1e-3)
            for name in ours.keys() & {"candidates", "ranks", "top_ids"}:  # near ties may change places
                assert (ours[name] == expected[name]).float().mean() > 0.98
            if signal == "hidden":
                torch.testing.assert_close(ours["hidden"], expected["hidden"], rtol=1e-3, atol=1e-3)


def test_the_same_batch_gets_the_same_states(readers: ReaderPair) -> None:
    first, second = (list(score_in_turn(BATCHES, readers, CONFIG)) for _ in range(2))
    for one, other in zip(first[1], second[1], strict=True):
        for name in one.keys() - {"sample_id"}:
            assert torch.equal(one[name], other[name])
    by_name = {row["sample_id"]: row for row in first[1]}
    assert torch.allclose(by_name["twin"]["hidden"], by_name["its twin"]["hidden"], atol=1e-4)
