"""A real vLLM server on a CPU: its log-probabilities beside those of transformers, on both of its routes."""

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

from tests.helpers.models import save_tiny_model
from tests.helpers.vllm_server import serve_vllm
from tsdkd.errors import InputError
from tsdkd.stages.models.language_model import LanguageModel
from tsdkd.stages.models.load import load_model
from tsdkd.stages.teacher_server.reading import ReadRequest, check_reading
from tsdkd.stages.teacher_server.routes import TokensRoute
from tsdkd.stages.teacher_server.server import TeacherServer

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")

REQUESTS = [ReadRequest(list(range(60 + i, 90 + 3 * i)), [5, 6, 7, *range(12, 20 + i)]) for i in range(6)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    path = save_tiny_model(tmp_path_factory.mktemp("served") / "model", seed=5, head_dim=32, padding_rows=0)
    return load_model(str(path), "float32")


@pytest.fixture(scope="module")
def url(model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    options = "--served-model-name", "tiny", "--max-logprobs", "24", "--enable-scale-out"
    with serve_vllm(model.name, tmp_path_factory.mktemp("log") / "server.log", *options) as server:
        yield server.url


def connect(url: str, model: LanguageModel, top_k: int = 20) -> TeacherServer:
    return TeacherServer(url, None, model.tokenizer, vocab=model.vocab, top_k=top_k, k=4)


def test_readings_equal_transformers(url: str, model: LanguageModel) -> None:
    with connect(url, model) as server:
        assert server.route.name == "/v1/completions"  # its runner on CPUs gives no log-probabilities of fixed ids
        assert server.tokenizer_checked
        assert server.longest == 512
        readings = server.read(REQUESTS)
        tokens = TokensRoute(server._connection, server.model)
        readings_of_tokens = [check_reading(r, tokens.read(r, 20), 20, 20, model.vocab) for r in REQUESTS]
    for request, *both in zip(REQUESTS, readings, readings_of_tokens, strict=True):
        with torch.no_grad():
            rows = model.model(torch.tensor([request.ids])).logits[0].log_softmax(-1)
        rows = rows[[position - 1 for position in request.positions]]
        own = torch.tensor([request.ids[position] for position in request.positions])
        for reading in both:
            assert reading.top_ids.equal(rows.topk(20).indices)
            torch.testing.assert_close(reading.top_log_probs, rows.topk(20).values, rtol=0, atol=1e-4)
            torch.testing.assert_close(reading.token_log_probs, rows.gather(-1, own[:, None])[:, 0], rtol=0, atol=1e-4)


def test_its_limit_of_log_probs_is_named(url: str, model: LanguageModel) -> None:
    with pytest.raises(InputError, match=r"gives at most 24 log-prob.*--max-logprobs 29, or give --top-k 24"):
        connect(url, model, top_k=25)
