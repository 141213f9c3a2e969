"""What the lines of a plan leave for those after them, beside what lies on disk already."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from tsdkd.artifacts import MANIFEST, Artifact, Kind, Manifest, load_manifest, read
from tsdkd.errors import InputError
from tsdkd.stages.models import chat_ids
from tsdkd.stages.planning.models import Model, embedded, find, key
from tsdkd.stages.rollouts.prompts import Prompts
from tsdkd.stages.scoring.cost import lengths

TOKENISED = 256
"""Prompts whose tokens are counted; more are like them."""


@dataclass(frozen=True)
class Texts:
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

    def answered(self, samples: int, new: int) -> "Texts":
        """Prompts alone, answered so often with so many tokens at most."""
        return Texts(self.count * samples, self.prompt, new, self.longest + new, at_most=True)


@dataclass
class Chain:
    lacking: Mapping[str, int]
    """The embedded models by name, with the layers that they lack."""
    prompts_on_hub: int | None = None
    """Of each dataset of the hub."""
    models: dict[Path, Model] = field(default_factory=dict)
    texts: dict[Path, Texts] = field(default_factory=dict)
    authors: dict[Path, dict[str, str]] = field(default_factory=dict)
    """Names of the models that an artifact comes from, by role."""
    found: dict[str, Model] = field(default_factory=dict)

    def model(self, name: str) -> Model:
        """Raises InputError where there is none and no line makes it."""
        if made := self.models.get(key(name)):
            return made
        if name not in self.found:
            self.found[name] = embedded(name, self.lacking[name]) if name in self.lacking else find(name)
        return self.found[name]

    def roles(self, place: Path, kind: Kind) -> dict[str, str]:
        """Who an artifact comes from. Raises ArtifactError where there is none and no line makes it."""
        if made := self.authors.get(key(place)):
            return made
        return {model.role: model.name for model in _manifest(place, kind).models}

    def rollouts(self, place: Path) -> Texts:
        """Raises ArtifactError where there are none and no line makes them."""
        if made := self.texts.get(key(place)):
            return made
        artifact = Artifact(place, _manifest(place, "rollouts"))
        found = [length for part in artifact.tables for length in lengths(artifact.read_part(part, COLUMNS))]
        responses = int(artifact.manifest.summary["response_tokens"]) / len(found)
        return Texts(len(found), sum(found) / len(found) - responses, responses, max(found), at_most=False)

    def prompts(self, source: Prompts, model: Model, most: int) -> Texts:
        """Prompts of up to `most` tokens. Raises InputError where they cannot be read, or counted before a download."""
        if source.on_hub:
            count = min((n for n in (source.limit, self.prompts_on_hub) if n is not None), default=None)
            if count is None:
                raise InputError(
                    f"How many prompts {source.place} has, only a download tells.", "Say it: tsdkd plan --prompts N."
                )
            return Texts(count, most, 0, most, at_most=True)
        prompts, tokenizer = iter(source), model.tokenizer()
        sizes = [min(most, len(chat_ids(tokenizer, prompt.messages))) for prompt in islice(prompts, TOKENISED)]
        count = len(sizes) + sum(1 for _ in prompts)
        if not count:
            raise InputError(f"No prompt of {source.place} is left: all are empty.", "Mend the file.")
        return Texts(count, sum(sizes) / len(sizes), 0, max(sizes), at_most=count > len(sizes))


COLUMNS = ["prompt_ids", "response_ids"]


def finished(place: Path) -> bool:
    """Is there an artifact that its stage would leave as it is?"""
    return (place / MANIFEST).is_file() and load_manifest(place).state == "complete"


def _manifest(place: Path, kind: Kind) -> Manifest:
    return read(place, kind, hashed=False).manifest
