"""Prompts as the token ids that a model reads."""

from transformers import PreTrainedTokenizerBase

from tsdkd.stages.data.messages import located
from tsdkd.stages.data.prompts import Prompt
from tsdkd.stages.models.tokenizers import chat_token_ids, require_chat_template


def prompt_token_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, day: str | None) -> list[int]:
    """Ids of a prompt in the model's chat template; `day`: the one that the template writes, None: today.

    Raises InputError as `chat_token_ids`, with the place of the prompt.
    """
    require_chat_template(tokenizer)
    with located(prompt.place):
        return chat_token_ids(tokenizer, prompt.messages, prompt.tools, day)
