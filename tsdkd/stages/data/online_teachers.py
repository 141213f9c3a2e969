"""The teachers of online training: one that is loaded, or several that are loaded one after the other."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from functools import lru_cache

import torch
from torch import Tensor

from tsdkd.core import Head, SeveralTeachers, TeacherHidden, TeacherSignal
from tsdkd.stages.data.batches import Batch, packed_batches, predicting_hidden
from tsdkd.stages.data.source import Sample, join_samples, sample_length, sample_turns
from tsdkd.stages.models.device import free_memory
from tsdkd.stages.models.language_model import LanguageModel
from tsdkd.stages.observer import Observer, SilentObserver

BATCH_TOKENS = 8192
"""Tokens of several samples that a teacher reads in one forward pass."""
HIDDEN = "teacher_hidden"
"""The key of a sample's hidden states (tokens, width), on the CPU in the precision of the teacher's head."""


class OnlineTeacher(ABC):
    """The teacher of online training, or several of them."""

    def read_ahead(self, samples: list[Sample]) -> list[Sample]:
        """Samples with responses, with what `recorded` needs of each one's teacher; one teacher reads nothing ahead."""
        return samples

    def recorded(self, samples: list[Sample]) -> dict[str, Tensor]:
        """What `read_ahead` kept of a micro-batch, as tensors."""
        return {}

    @abstractmethod
    def signal(self, batch: Batch) -> TeacherSignal:
        """The signal for the batch's response tokens."""


class LoadedTeacher(OnlineTeacher):
    """A teacher in memory, which reads each micro-batch."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self._head_on = lru_cache(maxsize=1)(lambda device: model.head.to(device).aligned)

    def signal(self, batch: Batch) -> TeacherHidden:
        device = batch["input_ids"].device
        return TeacherHidden(_read_hidden(self.model, batch).to(device), self._head_on(device))


class TeachersInTurn(OnlineTeacher):
    """Several teachers by name, of which at most one is in memory, and the heads of those that have read.

    Each reads its own samples of an optimizer step. The one that is still loaded reads first.
    """

    def __init__(self, load: Callable[[str, Observer], LanguageModel], observer: Observer) -> None:
        """`load`: loads a teacher by its name; its messages are shown the first time."""
        self._load = load
        self._observer = observer
        self._loaded: tuple[str, LanguageModel] | None = None
        self._heads: dict[str, Head] = {}

    def read_ahead(self, samples: list[Sample]) -> list[Sample]:
        read = list(samples)
        for name in self._in_turn({sample["teacher"] for sample in samples}):
            own = [i for i, sample in enumerate(samples) if sample["teacher"] == name]
            for i, hidden in zip(own, self._read(name, [samples[i] for i in own]), strict=True):
                read[i] = samples[i] | {HIDDEN: hidden}
        return read

    def _in_turn(self, names: Collection[str]) -> list[str]:
        return sorted(names, key=lambda name: (self._loaded is None or name != self._loaded[0], name))

    def _read(self, name: str, samples: list[Sample]) -> list[Tensor]:
        """The hidden states of each sample."""
        teacher = self._teacher(name)
        by_sample: dict[int, Tensor] = {}
        for batch in packed_batches(list(map(sample_length, samples)), BATCH_TOKENS):
            rows = [samples[i] for i in batch]
            hidden = _read_hidden(teacher, join_samples(rows, packed=True)).to(self._heads[name].weight.dtype).cpu()
            tokens = [sum(map(len, sample_turns(row))) for row in rows]
            by_sample.update(zip(batch, hidden.split(tokens), strict=True))
        return [by_sample[i] for i in range(len(samples))]

    def _teacher(self, name: str) -> LanguageModel:
        """The teacher of this name, loaded after the other one is freed."""
        if self._loaded is None or self._loaded[0] != name:
            self._loaded = None
            free_memory()
            is_first, start = name not in self._heads, time.perf_counter()
            teacher = self._load(name, self._observer if is_first else SilentObserver())
            self._loaded = name, teacher
            if is_first:
                self._heads[name] = teacher.head
                self._observer.info(
                    f"The teacher {name} ({teacher.name}) loads in {time.perf_counter() - start:.1f} s."
                )
        return self._loaded[1]

    def recorded(self, samples: list[Sample]) -> dict[str, Tensor]:
        """The hidden states of each teacher's tokens, and "owners" (tokens,), the index of each token's teacher."""
        names = sorted({sample["teacher"] for sample in samples})
        indices = torch.tensor([names.index(sample["teacher"]) for sample in samples])
        owners = indices.repeat_interleave(torch.tensor([len(sample[HIDDEN]) for sample in samples]))
        hidden = [torch.cat([s[HIDDEN] for s in samples if s["teacher"] == name]) for name in names]
        return {"owners": owners, **{f"hidden {name}": values for name, values in zip(names, hidden, strict=True)}}

    def signal(self, batch: Batch) -> SeveralTeachers:
        recorded = dict(batch["recorded"])
        owners = recorded.pop("owners")
        hidden = {key.removeprefix("hidden "): values for key, values in recorded.items()}
        return SeveralTeachers.of([TeacherHidden(h, self._head(name, h.device)) for name, h in hidden.items()], owners)

    def _head(self, name: str, device: torch.device) -> Head:
        self._heads[name] = self._heads[name].to(device).aligned
        return self._heads[name]


def _read_hidden(teacher: LanguageModel, batch: Batch) -> Tensor:
    """The teacher's hidden states of the batch's predicting positions (tokens, width), on its device."""
    with torch.no_grad(), torch.autocast(teacher.device.type, enabled=False):
        return predicting_hidden(teacher, batch)
