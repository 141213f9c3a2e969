"""What several tests of training observe."""

import pytest

from tsdkd.stages.data.online import OnlineSource
from tsdkd.stages.data.source import Sample


@pytest.fixture
def responses(monkeypatch: pytest.MonkeyPatch) -> list[list[Sample]]:
    """The samples with responses of every step, after those that are held out."""
    seen: list[list[Sample]] = []
    with_responses = OnlineSource.with_responses

    def spy(self: OnlineSource, *given: object) -> list[Sample]:
        seen.append(with_responses(self, *given))
        return seen[-1]

    monkeypatch.setattr(OnlineSource, "with_responses", spy)
    return seen
