"""The inputs of the commands of a plan: artifacts that exist, and artifacts that earlier commands will write."""

from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
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
    teachers: Mapping[str, int] = field(default_factory=dict)
    """Prompts by the name of their teacher; empty for prompts that are not read."""
    sources: Mapping[str, int] = field(default_factory=dict)
    """Prompts by their source; empty for prompts that are not read."""

    def teacher_fractions(self, names: Sequence[str]) -> list[float]:
        """The fraction of the prompts that each teacher has: of those that name it, else of its source's.

        Equal fractions for prompts that are not read.
        """
        counts = self.teachers if any(self.teachers) else self.sources
        total = sum(counts.values())
        if len(names) == 1 or not total:
            return [1 / len(names) for _ in names]
        return [counts.get(name, 0) / total for name in names]

    @property
    def total_tokens(self) -> float:
        return self.count * (self.prompt_tokens + self.response_tokens)

    @property
    def total_response_tokens(self) -> int:
        return round(self.count * self.response_tokens)

    def with_responses(self, per_prompt: int, max_new_tokens: int) -> "Workload":
        """Prompts with responses of the largest length."""
        return replace(
            self,
            count=self.count * per_prompt,
            response_tokens=max_new_tokens,
            max_tokens=self.max_tokens + max_new_tokens,
            is_upper_bound=True,
        )


@dataclass
class Chain:
    """The state of a plan after the commands so far. Keys are paths (`path_key`) unless noted."""

    embedded_models: Mapping[str, int]
    """The number of layers that each embedded model drops, by name."""
    hub_prompts: int | None = None
    """Assumed number of prompts of every hub dataset."""
    written_models: dict[Path, PlannedModel] = field(default_factory=dict)
    written_rollouts: dict[Path, Workload] = field(default_factory=dict)
    written_teacher_by: dict[Path, str | None] = field(default_factory=dict)
    """The column that names each prompt's teacher, of rollouts."""
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

    def teacher_by(self, rollouts: Path) -> str | None:
        """The column of the prompts by which rollouts record teachers."""
        if path_key(rollouts) in self.written_rollouts:
            return self.written_teacher_by[path_key(rollouts)]
        column: str | None = _load_manifest(rollouts, "rollouts").config.get("teacher_by")
        return column

    def rollouts(self, path: Path) -> Workload:
        """Raises ArtifactError for rollouts that neither exist nor are written by an earlier command."""
        if written := self.written_rollouts.get(path_key(path)):
            return written
        artifact = Artifact(path, _load_manifest(path, "rollouts"))
        lengths, teachers, sources = list[int](), Counter[str](), Counter[str]()
        for part in artifact.tables:
            table = artifact.read_part(part, [*LENGTH_COLUMNS, "teacher", "source"])
            lengths += sequence_lengths(table)
            teachers.update(name or "" for name in table["teacher"].to_pylist())
            sources.update(table["source"].to_pylist())
        count = len(lengths)
        response_tokens = int(artifact.manifest.summary["response_tokens"]) / count
        prompt_tokens = sum(lengths) / count - response_tokens
        return Workload(
            *(count, prompt_tokens, response_tokens, max(lengths)),
            is_upper_bound=False,
            teachers=teachers,
            sources=sources,
        )

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
        tokenizer = deepcopy(model.load_tokenizer())  # planned models share a tokenizer
        set_chat_format(tokenizer, chat)
        lengths, teachers, sources = list[int](), Counter[str](), Counter[str]()
        for prompt in source:
            teachers[prompt.teacher] += 1
            sources[prompt.source] += 1
            if len(lengths) < TOKENIZED_PROMPTS:
                lengths.append(len(prompt_token_ids(tokenizer, prompt, None, max_prompt_tokens)))
        count = teachers.total()
        if not count:
            raise InputError(f"All prompts of {source.path} are empty.", "Correct the file.")
        lengths = [min(max_prompt_tokens, length) for length in lengths]
        mean = sum(lengths) / len(lengths)
        is_upper_bound = count > len(lengths)
        return Workload(count, mean, 0, max(lengths), is_upper_bound, teachers, sources)


def is_complete(path: Path) -> bool:
    """Whether a stage would skip its work because this artifact is complete."""
    return (path / MANIFEST_FILE).is_file() and load_manifest(path).state == "complete"


def _load_manifest(path: Path, kind: ArtifactKind) -> Manifest:
    return read_artifact(path, kind, hashed=False).manifest
