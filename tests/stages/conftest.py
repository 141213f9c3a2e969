"""Rollouts and scores that tests of training share."""

from pathlib import Path

import pytest

from tests.helpers.scored_runs import scored_run


@pytest.fixture(scope="session")
def run(student: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scored_run(tmp_path_factory.mktemp("run"), student, teacher)
