"""Models with the shapes of Qwen2.5 and random weights, made on the device: nothing is downloaded or written."""

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from benchmarks.gpu.figures import Options
from tsdkd.stages.models.language_model import LanguageModel

TOKENS = 151_665
"""Ids of the tokenizer; further rows of the heads are padding."""
SHAPES = {  # layers, width, inner width, heads, key-value heads, rows of the head, tied head
    "1.5B": (28, 1536, 8960, 12, 2, 151_936, True),
    "14B": (48, 5120, 13824, 40, 8, 152_064, False),
}
TINY_SHAPES = {"1.5B": (2, 32, 64, 4, 2, 512, True), "14B": (3, 48, 96, 4, 2, 520, False)}


def shape(name: str, options: Options, dtype: torch.dtype = torch.bfloat16) -> Qwen2Config:
    """The config of a model of `SHAPES`."""
    layers, width, inner, heads, kv_heads, rows, tied = (TINY_SHAPES if options.tiny else SHAPES)[name]
    return Qwen2Config(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=rows,
        tie_word_embeddings=tied,
        max_position_embeddings=32768,
        dtype=dtype,
    )


def random_model(name: str, options: Options, dtype: torch.dtype = torch.bfloat16) -> LanguageModel:
    """A model of `SHAPES`, in evaluation mode."""
    torch.manual_seed(0)
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(
            shape(name, options, dtype), dtype=dtype, attn_implementation="sdpa"
        ).eval()
    tokens = 500 if options.tiny else TOKENS
    vocab = {f"t{i}": i for i in range(tokens)}
    backend = Tokenizer(WordLevel(vocab, unk_token="t0"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=f"t{tokens - 1}", pad_token=f"t{tokens - 1}"
    )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return LanguageModel(f"Qwen2.5 {name}, random weights", model, tokenizer)


def random_rows(count: int, prompt: int, response: int, vocab: int) -> list[dict[str, object]]:
    """Rollouts of random ids, all of one length."""
    ids = torch.randint(0, vocab, (count, prompt + response), generator=torch.Generator().manual_seed(0)).tolist()
    return [
        {
            "sample_id": str(i),
            "prompt_id": str(i),
            "author": "student",
            "prompt_ids": row[:prompt],
            "response_ids": row[prompt:],
            "finish_reason": "length",
        }
        for i, row in enumerate(ids)
    ]
