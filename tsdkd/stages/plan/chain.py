"""What the lines of a plan leave for those after them, beside what lies on disk already."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from tsdkd.artifacts.manifest import MANIFEST_FILE, ArtifactKind, Manifest, load_manifest
from tsdkd.artifacts.reader import Artifact, read_artifact
from tsdkd.errors import InputError
from tsdkd.stages.data.prompts import Prompts
from tsdkd.stages.data.score_cost import sequence_lengths
from tsdkd.stages.models.tokenizers import chat_token_ids
from tsdkd.stages.plan.models import PlannedModel, embedded_planned_model, find_planned_model, path_key

TOKENISED = 256
"""Prompts whose tokens are counted; more are like them."""


@dataclass(frozen=True)
class Workload:
    """Prompts and responses."""

    count: int
    prompt: float
    """Tokens of one, on average."""
    response: float
    longest: int
    """Tokens of a prompt with its response."""
    at_most: bool
    """Are these bounds?"""

    @property
    def tokens(self) -> float:
        return self.count * (self.prompt + self.response)

    @property
    def response_tokens(self) -> int:
        return round(self.count * self.response)

    def answered(self, samples: int, new: int) -> "Workload":
        """Prompts alone, answered so often with so many tokens at most."""
        return Workload(self.count * samples, self.prompt, new, self.longest + new, at_most=True)


@dataclass
class Chain:
    lacking: Mapping[str, int]
    """The embedded models by name, with the layers that they lack."""
    prompts_on_hub: int | None = None
    """Of each dataset of the hub."""
    models: dict[Path, PlannedModel] = field(default_factory=dict)
    texts: dict[Path, Workload] = field(default_factory=dict)
    authors: dict[Path, dict[str, str]] = field(default_factory=dict)
    """Names of the models that an artifact comes from, by role."""
    found: dict[str, PlannedModel] = field(default_factory=dict)

    def model(self, name: str) -> PlannedModel:
        """Raises InputError where there is none and no line makes it."""
        if made := self.models.get(path_key(name)):
            return made
        if name not in self.found:
            self.found[name] = (
                embedded_planned_model(name, self.lacking[name]) if name in self.lacking else find_planned_model(name)
            )
        return self.found[name]

    def roles(self, place: Path, kind: ArtifactKind) -> dict[str, str]:
        """Who an artifact comes from. Raises ArtifactError where there is none and no line makes it."""
        if made := self.authors.get(path_key(place)):
            return made
        return {model.role: model.name for model in _manifest(place, kind).models}

    def rollouts(self, place: Path) -> Workload:
        """Raises ArtifactError where there are none and no line makes them."""
        if made := self.texts.get(path_key(place)):
            return made
        artifact = Artifact(place, _manifest(place, "rollouts"))
        found = [length for part in artifact.tables for length in sequence_lengths(artifact.read_part(part, COLUMNS))]
        responses = int(artifact.manifest.summary["response_tokens"]) / len(found)
        return Workload(len(found), sum(found) / len(found) - responses, responses, max(found), at_most=False)

    def prompts(self, source: Prompts, model: PlannedModel, most: int) -> Workload:
        """Prompts of up to `most` tokens. Raises InputError where they cannot be read, or counted before a download."""
        if source.on_hub:
            count = min((n for n in (source.limit, self.prompts_on_hub) if n is not None), default=None)
            if count is None:
                raise InputError(
                    f"How many prompts {source.path} has, only a download tells.", "Say it: tsdkd plan --prompts N."
                )
            return Workload(count, most, 0, most, at_most=True)
        prompts, tokenizer = iter(source), model.tokenizer()
        sizes = [min(most, len(chat_token_ids(tokenizer, prompt.messages))) for prompt in islice(prompts, TOKENISED)]
        count = len(sizes) + sum(1 for _ in prompts)
        if not count:
            raise InputError(f"No prompt of {source.path} is left: all are empty.", "Mend the file.")
        return Workload(count, sum(sizes) / len(sizes), 0, max(sizes), at_most=count > len(sizes))


COLUMNS = ["prompt_ids", "response_ids"]


def is_complete(place: Path) -> bool:
    """Is there an artifact that its stage would leave as it is?"""
    return (place / MANIFEST_FILE).is_file() and load_manifest(place).state == "complete"


def _manifest(place: Path, kind: ArtifactKind) -> Manifest:
    return read_artifact(place, kind, hashed=False).manifest
