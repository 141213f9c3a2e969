"""Prompts as the token ids that a model reads."""

from transformers import PreTrainedTokenizerBase

from tsdkd.stages.data.messages import located
from tsdkd.stages.data.prompts import Prompt
from tsdkd.stages.models.chat import fit_system
from tsdkd.stages.models.tokenizers import chat_token_ids, require_chat_template


def prompt_token_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, day: str | None, max_tokens: int | None = None
) -> list[int]:
    """Ids of a prompt in the model's chat template; `day`: the day that the template writes; None: today.

    Of a prompt that is much longer than `max_tokens`, only the start becomes ids: at least `max_tokens` + 1.
    Leading system messages join the first user message if the template refuses or drops them.

    Raises InputError as `chat_token_ids`, with the location of the prompt.
    """
    require_chat_template(tokenizer)
    with located(prompt.location):
        messages = fit_system(tokenizer, prompt.messages)
        return chat_token_ids(tokenizer, messages, prompt.tools, day, max_tokens)
