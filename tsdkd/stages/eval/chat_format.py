"""The chat format of an evaluated model: whether prompts have it, and whether a checkpoint was trained with it."""

import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from tsdkd.artifacts.files import MANIFEST_FILE
from tsdkd.artifacts.manifest import load_manifest
from tsdkd.artifacts.reader import run_of
from tsdkd.errors import InputError
from tsdkd.stages.config.chat import ChatConfig
from tsdkd.stages.config.eval import EvalConfig
from tsdkd.stages.models.chat import require_turns
from tsdkd.stages.models.chat_format import template_defaults
from tsdkd.stages.models.paths import model_directory
from tsdkd.stages.models.record import chat_template_digest
from tsdkd.stages.models.tokenizers import load_tokenizer, require_chat_template
from tsdkd.stages.results.benchmark import Benchmark


def uses_chat_template(model: str, config: EvalConfig, benchmarks: list[Benchmark]) -> bool:
    """Raises InputError where the template is missing, or refuses the roles of a benchmark."""
    tokenizer = load_tokenizer(model, config.chat)
    has_template = tokenizer.chat_template is not None
    if config.chat_template and not has_template:
        raise InputError(f"{model} has no chat template.", "Leave out --chat, or give --chat-template plain or FILE.")
    chat = has_template if config.chat_template is None else config.chat_template
    if chat:
        require_chat_template(tokenizer)
        for benchmark in benchmarks:
            require_turns(tokenizer, benchmark.roles)
    return chat


def require_trained_format(model: str, output: Path, config: EvalConfig) -> None:
    """Raises InputError where a format is given to the checkpoint of this run that was trained with another one."""
    directory = model_directory(model)
    if not config.chat.is_set or run_of(directory) != run_of(output) or not (directory / MANIFEST_FILE).is_file():
        return
    manifest = load_manifest(directory)
    if manifest.kind != "checkpoint":
        return
    trained, given = load_tokenizer(model), load_tokenizer(model, config.chat)
    if chat_template_digest(given) != manifest.model("student").chat_template:
        raise InputError(
            f"{model} was trained with {_defaults_in_words(trained)}, and these options make "
            f"{_defaults_in_words(given)}.",
            "Leave out --chat-template and --chat-template-kwargs for this checkpoint, or write the results of another "
            "format outside its run with --results.",
        )


def _defaults_in_words(tokenizer: PreTrainedTokenizerBase) -> str:
    defaults, digest = template_defaults(tokenizer.chat_template), chat_template_digest(tokenizer)[:12]
    keywords = f" with {json.dumps(defaults)}" if defaults else ""
    return f"the chat template {digest}{keywords}"


def template_in_words(model: str, chat: ChatConfig) -> str:
    """Names the keywords of the command, and those that a checkpoint's template has from its training."""
    template = f"the chat template {chat.template}" if chat.template else "its chat template"
    keywords = template_defaults(load_tokenizer(model, chat).chat_template)
    return f"{template} with {json.dumps(keywords, sort_keys=True)}" if keywords else template
