"""Responses end at an end token, at a stop string or at their limit, and the finish reason names which."""

from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tests.helpers.models import byte_tokenizer
from tsdkd.errors import InputError
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.data.requests import Request, RequestBatch, Response
from tsdkd.stages.engines.both_models import BothModelsEngine
from tsdkd.stages.engines.ends import StopStringFinder, finish_reason, require_stop_support
from tsdkd.stages.engines.protocol import Engine
from tsdkd.stages.engines.transformers_engine import TransformersEngine
from tsdkd.stages.models.language_model import LanguageModel
from tsdkd.stages.models.load import load_model

CONFIG = GenerateConfig(max_new_tokens=24, batch_size=4)
PROMPTS = [[(7 * i + 3 * j * j + j) % 250 for j in range(length)] for i, length in enumerate([9, 3, 1, 5, 5])]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def pair(student: Path, teacher: Path) -> tuple[LanguageModel, LanguageModel]:
    return load_model(str(student), "float32"), load_model(str(teacher), "float32")


def bytes_of(text: bytes, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """One token per byte; the byte-level alphabet writes the bytes that do not print as characters above 255."""
    hidden = [*range(33), *range(127, 161), 173]
    characters = [chr(256 + hidden.index(byte)) if byte in hidden else chr(byte) for byte in text]
    return [tokenizer.get_vocab()[character] for character in characters]


@pytest.mark.parametrize(
    ("prompt", "response", "stop", "length"),
    [
        (b"", b"one\n\ntwo", ["\n\n"], 5),
        (b"Stop", b"go Stop", ["Stop"], 7),
        (b"St", b"op St", ["Stop"], None),  # the prompt holds the first half
        (b"", "naïve".encode(), ["ï"], 4),  # the character's second byte
        (b"", "na€".encode(), ["€"], 5),
        (b"", b"\xff\xfea\x80stop\x80", ["stop"], 8),
        (b"\xe2\x82", b"\xacstop", ["stop"], 5),  # the prompt ends within a character
        (b"", b"abcdef", ["def", "bc", "zz"], 3),
        (b"", b"a", ["a"], 1),
        (b"", b"abc", ["abcd"], None),
    ],
)
def test_the_token_that_completes_a_stop_string(
    tokenizer: PreTrainedTokenizerFast, prompt: bytes, response: bytes, stop: list[str], length: int | None
) -> None:
    finder = StopStringFinder(stop, tokenizer, bytes_of(prompt, tokenizer))
    ids = bytes_of(response, tokenizer)
    found = [finder.append(token) for token in ids]
    assert finder.found is (length is not None)
    assert finder.length == (length or len(ids))
    assert found == [length is not None and n >= length for n in range(1, len(ids) + 1)]


def test_a_stop_string_may_hold_the_text_of_a_special_token(tokenizer: PreTrainedTokenizerFast) -> None:
    finder = StopStringFinder(["x<|start|>"], tokenizer, [])
    assert [finder.append(token) for token in (*bytes_of(b"x", tokenizer), 256)] == [False, True]


def test_the_first_word_of_a_response_keeps_its_space() -> None:
    """SentencePiece's decoder drops the space of a first token; the prompt comes before it."""
    backend = Tokenizer(models.WordLevel({"▁one": 0, "▁two": 1}))
    backend.decoder = decoders.Metaspace()
    finder = StopStringFinder([" two"], PreTrainedTokenizerFast(tokenizer_object=backend), [0])
    assert finder.append(1)


def sample(engine: Engine, count: int = len(PROMPTS)) -> list[Response]:
    requests = [Request(str(i), prompt, i) for i, prompt in enumerate(PROMPTS[:count])]
    ((_, responses),) = engine.sample(iter([RequestBatch(requests)]), lambda _: None)
    return responses


def text_pairs(responses: list[Response], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Two adjacent printable characters of each response, from its middle if there are any."""
    pairs = []
    for response in responses:
        text = tokenizer.decode(response.ids)
        fitting = [text[i : i + 2] for i in range(2, len(text) - 1) if text[i : i + 2].isascii()]
        pairs += fitting[:1]
    return pairs


def cut_by_definition(
    ids: list[int], stop: tuple[str, ...], tokenizer: PreTrainedTokenizerFast, reason: str
) -> tuple[list[int], str]:
    """The shortest beginning whose text holds a stop string."""
    for n in range(1, len(ids) + 1):
        if any(text in tokenizer.decode(ids[:n]) for text in stop):
            return ids[:n], "stop"
    return ids, reason


def engine_of(pair: tuple[LanguageModel, LanguageModel], config: GenerateConfig) -> Engine:
    joint = config.policy in {"speculative", "teacher-mixed"}
    return BothModelsEngine(*pair, config) if joint else TransformersEngine(pair[0], config)


@pytest.mark.parametrize(
    ("policy", "draft_tokens"), [("student", 8), ("speculative", 1), ("speculative", 8), ("teacher-mixed", 8)]
)
def test_each_response_of_a_batch_ends_at_its_own_stop_string(
    pair: tuple[LanguageModel, LanguageModel], policy: str, draft_tokens: int
) -> None:
    config = replace(CONFIG, policy=policy, temperature=0, draft_tokens=draft_tokens)
    whole, tokenizer = sample(engine_of(pair, config)), pair[0].tokenizer
    stop = tuple(text_pairs(whole, tokenizer))
    assert len(stop) >= 3
    stopped = sample(engine_of(pair, replace(config, stop=stop)))
    expected = [cut_by_definition(response.ids, stop, tokenizer, response.finish_reason) for response in whole]
    assert [(response.ids, response.finish_reason) for response in stopped] == expected
    assert len({len(response.ids) for response in stopped}) > 1
    assert all(len(some.ids) <= len(every.ids) for some, every in zip(stopped, whole, strict=True))


def test_stop_strings_work_without_an_end_token(pair: tuple[LanguageModel, LanguageModel]) -> None:
    """transformers pads no finished response then: what it samples beyond the stop string is dropped."""
    endless = replace(pair[0])
    vars(endless)["end_ids"] = []
    config = replace(CONFIG, temperature=0)
    whole = sample(TransformersEngine(endless, config))
    stop = tuple(text_pairs(whole, endless.tokenizer))
    stopped = sample(TransformersEngine(endless, replace(config, stop=stop)))
    expected = [cut_by_definition(response.ids, stop, endless.tokenizer, "length") for response in whole]
    assert [(response.ids, response.finish_reason) for response in stopped] == expected


@pytest.mark.parametrize("policy", ["student", "speculative", "teacher-mixed"])
def test_a_rollout_is_the_beginning_of_the_response(pair: tuple[LanguageModel, LanguageModel], policy: str) -> None:
    """A response that ends with its last allowed token has ended; another one is cut on purpose."""
    config = replace(CONFIG, policy=policy, temperature=0)
    whole = sample(engine_of(pair, config))
    last = whole[0].ids[3]
    for model in pair:
        vars(model)["end_ids"] = [last, 257]
    limit = whole[0].ids.index(last) + 1
    cut = sample(engine_of(pair, replace(config, rollout_tokens=limit)))
    assert [response.ids for response in cut] == [_through(response.ids[:limit], last) for response in whole]
    assert cut[0].finish_reason == "stop"
    assert {response.finish_reason for response in cut if response.ids[-1] != last} == {"early"}
    truncated = sample(engine_of(pair, replace(config, max_new_tokens=limit)))
    assert [response.ids for response in truncated] == [response.ids for response in cut]
    assert {response.finish_reason for response in truncated if response.ids[-1] != last} == {"length"}


def _through(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end) + 1] if end in ids else ids


def test_end_ids_of_a_pair_end_responses_if_both_models_know_them(
    pair: tuple[LanguageModel, LanguageModel],
) -> None:
    """One id lies outside the shared vocabulary: it is never sampled, and ends nothing."""
    student = pair[0]
    first = sample(TransformersEngine(student, replace(CONFIG, temperature=0)))[0].ids[2]
    ended = replace(student, pair_end_ids=[first, 400], shared_vocab=258)
    assert ended.end_ids == sorted({first, 257})
    assert replace(student, pair_end_ids=[first, 200, 400]).end_ids == sorted({first, 200, 257})
    response = sample(TransformersEngine(ended, replace(CONFIG, temperature=0)))[0]
    assert response.ids[-1] == first
    assert response.finish_reason == "stop"


def test_a_response_of_an_end_token_alone(pair: tuple[LanguageModel, LanguageModel]) -> None:
    first = sample(TransformersEngine(pair[0], replace(CONFIG, temperature=0)), 1)[0].ids[0]
    ended = replace(pair[0], pair_end_ids=[first])
    assert sample(TransformersEngine(ended, replace(CONFIG, temperature=0)), 1) == [Response([first], "stop")]


def test_what_cannot_end_a_response_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="A stop string is empty"):
        GenerateConfig(stop=("a", ""))
    with pytest.raises(InputError, match="--rollout-tokens 512 cuts no response"):
        GenerateConfig(rollout_tokens=512)
    require_stop_support(GenerateConfig(stop=("a",)), tokenizer)
    slow = type("Slow", (), {"is_fast": False})()
    require_stop_support(GenerateConfig(), slow)
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        require_stop_support(GenerateConfig(stop=("a",)), slow)
    assert finish_reason(GenerateConfig(rollout_tokens=4), ended=True) == "stop"
