"""Fixtures of all tests: tiny models of one family, prompts and benchmark rows."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import settings

from tests.helpers.benchmark_rows import write_rows
from tests.helpers.models import save_tiny_model
from tests.helpers.prompts import REAL_DATA, write_prompts
from tsdkd.artifacts.files import CONFIG_FILE, JOURNAL_FILE, LOCK_FILE, TIMES_FILE

torch.set_num_threads(1)  # tiny matrices; more threads only wait for each other

FIRST = {
    "test_vllm.py",
    "test_online_vllm.py",
    "test_online_served.py",
    "test_processes.py",
    "test_tiny.py",
    "test_gpu.py",
}
"""The longest files: pytest-xdist must not start one of them last, when other workers have no more files."""

settings.register_profile("tsdkd", deadline=None)  # tests may be slow on a busy machine
settings.load_profile("tsdkd")


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # pytest-xdist starts the files with the fewest tests last


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in FIRST)


@pytest.fixture(autouse=True, scope="session")
def auto_is_transformers() -> Iterator[None]:
    """Tests sample with transformers, whatever is installed: vLLM takes half a minute to load."""
    with patch("tsdkd.stages.engines.choice.has_vllm", lambda: False):
        yield


@pytest.fixture(autouse=True, scope="module")
def imported_modules_are_frozen() -> None:
    """Stages collect garbage; a collection takes half a second unless it skips the objects of imported modules."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "teacher", seed=1, layers=4, width=48, padding_rows=14)


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another width and another padding of the vocabulary than the teacher, as in Qwen2.5 1.5B and 14B."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "student", seed=2)


@pytest.fixture(scope="session")
def other_family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of another family, with another tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "other_family", seed=3, extra=("<|tool|>",))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_prompts(tmp_path / "prompts.jsonl", 10)


@pytest.fixture
def real_data() -> Path:
    """Real benchmark rows and prompts, which are not part of the project."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"needs the real data at {REAL_DATA}")
    return REAL_DATA


@pytest.fixture(scope="session")
def punkt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """nltk's sentence splitter without learned parameters: it loads, and splits at full stops."""
    import nltk

    directory = tmp_path_factory.mktemp("nltk")
    english = directory / "tokenizers" / "punkt_tab" / "english"
    english.mkdir(parents=True)
    for name in ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt"):
        (english / name).touch()
    nltk.data.path.append(str(directory))
    yield
    nltk.data.path.remove(str(directory))


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up benchmark rows, as --data."""
    return write_rows(tmp_path_factory.mktemp("rows") / "data")


Files = Callable[[Path], dict[str, bytes]]


@pytest.fixture
def contents() -> Files:
    """Every file of an artifact with its bytes, without lock, journal, times and config.yaml."""
    return lambda path: {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name not in {LOCK_FILE, JOURNAL_FILE, TIMES_FILE, CONFIG_FILE}
    }
