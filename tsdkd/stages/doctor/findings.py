"""Findings: one fact each about models, prompts or responses, with its reason and what to do."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from tsdkd.errors import TsdkdError

Status = Literal["ok", "look", "stop"]
"""stop: a stage would refuse, or the run would be wasted. look: decide whether this is intended."""
Result = TypeVar("Result")


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis."""

    name: str
    status: Status
    reason: str
    """The cause, with its numbers."""
    remedy: str = ""
    """What to do; empty if ok."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """The numbers of the reason, for scripts."""


@dataclass
class Findings:
    """The findings so far, in order."""

    all: list[Finding] = field(default_factory=list)

    @property
    def stops(self) -> list[Finding]:
        return [finding for finding in self.all if finding.status == "stop"]

    def add(self, name: str, find: Callable[[], Finding]) -> None:
        """Add what `find` returns; a refusal of it becomes a finding `name` that stops."""
        if finding := self.attempt(name, find):
            self.all.append(finding)

    def attempt(self, name: str, work: Callable[[], Result]) -> Result | None:
        """The result of some work; None if it was refused, which becomes a finding `name` that stops."""
        try:
            return work()
        except TsdkdError as error:
            self.all.append(Finding(name, "stop", error.cause, error.remedy))
            return None


def finding(
    name: str,
    reason: str,
    problem: str = "",
    remedy: str = "",
    status: Status = "look",
    values: Mapping[str, Any] = MappingProxyType({}),
) -> Finding:
    """A finding that is ok without a `problem`; with one, which follows the reason, it has `status` and `remedy`."""
    if not problem:
        return Finding(name, "ok", reason, "", dict(values))
    return Finding(name, status, f"{reason} {problem}", remedy, dict(values))
