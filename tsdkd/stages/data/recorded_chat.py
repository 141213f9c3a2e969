"""The chat format that an artifact records: its keywords in the configuration, a template's file as parent and part.

Later stages take the format of the rollouts, whose copy of the template stays when the file changes. Loads no torch.
"""

import shutil
from dataclasses import replace
from pathlib import Path

from tsdkd.artifacts.files import CHAT_TEMPLATE_FILE
from tsdkd.artifacts.hashing import file_digest
from tsdkd.artifacts.json_files import conform
from tsdkd.artifacts.manifest import Parent, relative_path
from tsdkd.artifacts.reader import Artifact, check_parts
from tsdkd.artifacts.regular_files import require_regular_file
from tsdkd.artifacts.writer import Writer
from tsdkd.errors import InputError
from tsdkd.stages.config.chat import TEMPLATE_PARENT, ChatConfig


def template_parents(chat: ChatConfig, output: Path) -> tuple[Parent, ...]:
    """The template's file as the parent of an artifact at `output`; nothing for a format without a file."""
    if chat.file is None:
        return ()
    file = _existing(chat.file)
    return (Parent(TEMPLATE_PARENT, file_digest(file), relative_path(file, output)),)


def add_template(writer: Writer, chat: ChatConfig) -> None:
    """Make the template's file, if the format has one, a part of the artifact."""
    if chat.file and not writer.has(CHAT_TEMPLATE_FILE):
        shutil.copyfile(chat.file, writer.temporary_path(CHAT_TEMPLATE_FILE))
        writer.add_file(CHAT_TEMPLATE_FILE)


def chat_of_rollouts(rollouts: Artifact, given: ChatConfig) -> ChatConfig:
    """The format of the rollouts.

    Raises InputError where the `given` one is set and differs, ArtifactError where the template's copy was changed.
    """
    recorded: ChatConfig = conform(rollouts.manifest.config.get("chat", {}), ChatConfig)
    copies = tuple(part for part in rollouts.manifest.parts if part.file == CHAT_TEMPLATE_FILE)
    if copies:
        check_parts(rollouts.path, replace(rollouts.manifest, parts=copies))
        recorded = ChatConfig(str(rollouts.path / CHAT_TEMPLATE_FILE), recorded.kwargs)
    if given.is_set and _identity(given) != _identity(recorded):
        raise InputError(
            f"The rollouts at {rollouts.path} were made {_in_words(recorded)}, and this command runs "
            f"{_in_words(given)}.",
            "Leave out --chat-template and --chat-template-kwargs, which takes the rollouts' format, or run "
            "`tsdkd generate` with other ones.",
        )
    return recorded


def _existing(file: str) -> Path:
    require_regular_file(Path(file), "chat template")
    return Path(file)


def _identity(chat: ChatConfig) -> tuple[str | None, str | None]:
    """The word or the hash of the template, and the keywords."""
    return (file_digest(_existing(chat.file)) if chat.file else chat.template), chat.kwargs


def _in_words(chat: ChatConfig) -> str:
    template, kwargs = _identity(chat)
    if chat.file:
        template = f"{Path(chat.file).name} ({str(template)[:12]})"
    options = [f"--chat-template {template}"] * bool(template) + [f"--chat-template-kwargs '{kwargs}'"] * bool(kwargs)
    return f"with {' and '.join(options)}" if options else "with the model's own chat template"
