"""The inputs of the commands of a plan: artifacts that exist, and artifacts that earlier commands will write."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from tsdkd.artifacts.files import MANIFEST_FILE
from tsdkd.artifacts.manifest import ArtifactKind, Manifest, load_manifest
from tsdkd.artifacts.reader import Artifact, read_artifact
from tsdkd.errors import InputError
from tsdkd.stages.config.chat import ChatConfig
from tsdkd.stages.data.prompt_tokens import prompt_token_ids
from tsdkd.stages.data.prompts import Prompts
from tsdkd.stages.data.rollout_lengths import LENGTH_COLUMNS, sequence_lengths
from tsdkd.stages.models.chat_format import set_chat_format
from tsdkd.stages.plan.models import PlannedModel, embedded_planned_model, load_planned_model, path_key

TOKENIZED_PROMPTS = 256
"""Prompts whose tokens are counted; further prompts are assumed to have the same mean length."""


@dataclass(frozen=True)
class Workload:
    """Sizes of prompts with or without responses."""

    count: int
    """Prompts with their responses."""
    prompt_tokens: float
    """Mean per prompt."""
    response_tokens: float
    """Mean per response; 0 for prompts alone."""
    max_tokens: int
    """Tokens of the longest prompt with its response."""
    is_upper_bound: bool

    @property
    def total_tokens(self) -> float:
        return self.count * (self.prompt_tokens + self.response_tokens)

    @property
    def total_response_tokens(self) -> int:
        return round(self.count * self.response_tokens)

    def with_responses(self, per_prompt: int, max_new_tokens: int) -> "Workload":
        """Prompts with responses of the largest length."""
        max_tokens = self.max_tokens + max_new_tokens
        return Workload(self.count * per_prompt, self.prompt_tokens, max_new_tokens, max_tokens, is_upper_bound=True)


@dataclass
class Chain:
    """The state of a plan after the commands so far. Keys are paths (`path_key`) unless noted."""

    embedded_models: Mapping[str, int]
    """The number of layers that each embedded model drops, by name."""
    hub_prompts: int | None = None
    """Assumed number of prompts of every hub dataset."""
    written_models: dict[Path, PlannedModel] = field(default_factory=dict)
    written_rollouts: dict[Path, Workload] = field(default_factory=dict)
    written_roles: dict[Path, dict[str, str]] = field(default_factory=dict)
    """Names of the models that an artifact is made from, by role."""
    loaded_models: dict[str, PlannedModel] = field(default_factory=dict)
    """By name."""

    def model(self, name: str) -> PlannedModel:
        """Raises InputError for a model that neither exists nor is written by an earlier command."""
        if written := self.written_models.get(path_key(name)):
            return written
        if name not in self.loaded_models:
            embedded = name in self.embedded_models
            self.loaded_models[name] = (
                embedded_planned_model(name, self.embedded_models[name]) if embedded else load_planned_model(name)
            )
        return self.loaded_models[name]

    def roles(self, path: Path, kind: ArtifactKind) -> dict[str, str]:
        """Names of the models that an artifact is made from, by role.

        Raises ArtifactError for an artifact that neither exists nor is written by an earlier command.
        """
        if written := self.written_roles.get(path_key(path)):
            return written
        return {model.role: model.name for model in _load_manifest(path, kind).models}

    def rollouts(self, path: Path) -> Workload:
        """Raises ArtifactError for rollouts that neither exist nor are written by an earlier command."""
        if written := self.written_rollouts.get(path_key(path)):
            return written
        artifact = Artifact(path, _load_manifest(path, "rollouts"))
        lengths = [
            length for part in artifact.tables for length in sequence_lengths(artifact.read_part(part, LENGTH_COLUMNS))
        ]
        count = len(lengths)
        response_tokens = int(artifact.manifest.summary["response_tokens"]) / count
        prompt_tokens = sum(lengths) / count - response_tokens
        return Workload(count, prompt_tokens, response_tokens, max(lengths), is_upper_bound=False)

    def prompts(self, source: Prompts, model: PlannedModel, max_prompt_tokens: int, chat: ChatConfig) -> Workload:
        """Prompts of up to `max_prompt_tokens` tokens in a chat format.

        Raises InputError for prompts that cannot be read, and for a hub dataset of unknown size.
        """
        if source.on_hub:
            count = min((n for n in (source.limit, self.hub_prompts) if n is not None), default=None)
            if count is None:
                raise InputError(
                    f"The number of prompts in {source.path} is unknown before its download.",
                    "Give it: tsdkd plan --prompts N.",
                )
            return Workload(count, max_prompt_tokens, 0, max_prompt_tokens, is_upper_bound=True)
        prompts, tokenizer = iter(source), deepcopy(model.load_tokenizer())  # planned models share a tokenizer
        set_chat_format(tokenizer, chat)
        lengths = [
            min(max_prompt_tokens, len(prompt_token_ids(tokenizer, prompt, None, max_prompt_tokens)))
            for prompt in islice(prompts, TOKENIZED_PROMPTS)
        ]
        count = len(lengths) + sum(1 for _ in prompts)
        if not count:
            raise InputError(f"All prompts of {source.path} are empty.", "Correct the file.")
        mean = sum(lengths) / len(lengths)
        return Workload(count, mean, 0, max(lengths), is_upper_bound=count > len(lengths))


def is_complete(path: Path) -> bool:
    """Whether a stage would skip its work because this artifact is complete."""
    return (path / MANIFEST_FILE).is_file() and load_manifest(path).state == "complete"


def _load_manifest(path: Path, kind: ArtifactKind) -> Manifest:
    return read_artifact(path, kind, hashed=False).manifest
