"""A family of tiny models that every test can afford: byte tokenizer, two to four layers, made on the spot."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.rows import write_rows
from tsdkd.artifacts import JOURNAL, LOCK

torch.set_num_threads(1)  # tiny matrices; more threads only wait for each other

settings.register_profile("ours", deadline=None)  # a busy machine is no failure
settings.load_profile("ours")

SHARED = Path(__file__).parents[2] / "shared"
CHAT = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer(extra: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """One token per byte, two markers; the pad token is the end token, as in many real families."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|start|>", "<|end|>", *extra])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|start|>", eos_token="<|end|>", pad_token="<|end|>", chat_template=CHAT
    )


def save_tiny_model(
    path: Path,
    *,
    seed: int,
    layers: int = 2,
    width: int = 32,
    padding_rows: int = 6,
    extra: tuple[str, ...] = (),
    **more: object,
) -> Path:
    """`more` goes to the configuration."""
    tokenizer = byte_tokenizer(extra)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + padding_rows,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **more,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(autouse=True, scope="session")
def auto_is_transformers() -> Iterator[None]:
    """Tests sample with transformers, whatever is installed: vLLM takes half a minute to load."""
    with patch("tsdkd.stages.rollouts.engines.has_vllm", lambda: False):
        yield


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "teacher", seed=1, layers=4, width=48, padding_rows=14)


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another width and another padding of the vocabulary than the teacher, as in Qwen2.5 1.5B and 14B."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "student", seed=2)


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with another tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "stranger", seed=3, extra=("<|tool|>",))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_prompts(tmp_path / "prompts.jsonl", 10)


def write_prompts(path: Path, count: int) -> Path:
    rows = [{"prompt": f"What is {i} plus {i * 7 % 5}{'?' * (i % 4 + 1)}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def shared() -> Path:
    """Real benchmark rows and prompts, which are not part of the project."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the real data at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def punkt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """nltk's sentence splitter without what it learned: enough to load, and to split at full stops."""
    import nltk

    place = tmp_path_factory.mktemp("nltk")
    english = place / "tokenizers" / "punkt_tab" / "english"
    english.mkdir(parents=True)
    for name in ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt"):
        (english / name).touch()
    nltk.data.path.append(str(place))
    yield
    nltk.data.path.remove(str(place))


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up benchmark rows, as --data."""
    return write_rows(tmp_path_factory.mktemp("rows") / "data")


Files = Callable[[Path], dict[str, bytes]]


@pytest.fixture
def contents() -> Files:
    """Every file of an artifact with its bytes, lock and journal aside."""
    return lambda path: {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name not in {LOCK, JOURNAL}
    }
