"""A sample of the bad inputs: each is refused with a cause and a remedy, or runs."""

from pathlib import Path

import pytest

from benchmarks.robustness import bad_inputs
from benchmarks.robustness.spoiled_commands import make_inputs

TRIALS = 12


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inputs")
    make_inputs(directory)
    return directory


@pytest.mark.parametrize("trial", range(TRIALS))
def test_no_input_ends_in_a_raw_error(trial: int, inputs: Path) -> None:
    _, outcome, report = bad_inputs.run_trial(inputs, 1, trial)
    assert outcome in {"refused", "ran"}, report


def test_an_error_of_a_library_counts_as_raw() -> None:
    assert bad_inputs.outcome_of(1, "error: KeyError: 'a'\ntry:   Run `tsdkd --debug ...`") == "raw"
    assert bad_inputs.outcome_of(2, "error: The file x does not exist.\ntry:   Check the path.") == "refused"
    assert bad_inputs.outcome_of(1, "Traceback") == bad_inputs.outcome_of(None, "no result") == "raw"
    assert bad_inputs.outcome_of(0, "") == "ran"
