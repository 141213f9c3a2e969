"""Tiny models for tests: a byte tokenizer, two to four layers, random weights."""

import json
import shutil
from collections.abc import Collection
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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


def copy_with_ends(model: Path, path: Path, end_ids: Collection[int], template: str = CHAT) -> Path:
    """A copy of a model that ends responses with these ids alone, and writes prompts in this chat template."""
    shutil.copytree(model, path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [*end_ids]}))
    config = json.loads((path / "tokenizer_config.json").read_text())
    config["eos_token"] = config["pad_token"] = None
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "chat_template.jinja").write_text(template)
    return path
