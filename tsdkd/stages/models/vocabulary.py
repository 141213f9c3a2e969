"""The ids that a model knows: those of its tokenizer that its head has rows for.

Rows past the tokenizer's largest id are padding, which is never sampled. Ids past the last row are those of tokens that
were added to the tokenizer alone, such as a padding token; no text may contain them. Two models that are compared share
the ids that both know.
"""

from transformers import PreTrainedTokenizerBase

from tsdkd.errors import InputError
from tsdkd.stages.models.tokenizers import vocab_size


def known_vocab(name: str, tokenizer: PreTrainedTokenizerBase, rows: int) -> int:
    """The number of ids that a model with `rows` rows in its head knows.

    Raises InputError if the tokenizer has other ids past the last row than those of added tokens.
    """
    size = vocab_size(tokenizer)
    own_ids = set(tokenizer.get_vocab().values()) - tokenizer.added_tokens_decoder.keys()
    if max(own_ids, default=0) >= rows:
        raise InputError(
            f"The tokenizer of {name} has {size:,} ids, but the model's head has {rows:,} rows.",
            "Save the tokenizer that belongs to the model beside it, or resize the model's embeddings.",
        )
    return min(size, rows)


def require_known_ids(name: str, vocab: int, largest_id: int) -> None:
    """Raises InputError where a text's largest id is not among the `vocab` ids that a model knows."""
    if largest_id >= vocab:
        raise InputError(
            f"The prompts or responses contain the id {largest_id:,}, but {name} knows the ids below {vocab:,}.",
            "Resize the model's embeddings to its tokenizer, or leave such tokens out of the prompts and the template.",
        )
