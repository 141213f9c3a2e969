"""vLLM's bars: that of the responses is forwarded, that around the prompts is not shown."""

import pytest

from tsdkd.stages.engines.vllm_progress import forward_progress


def test_responses_are_forwarded_and_prompts_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    counts: list[int] = []
    make_bar = forward_progress(counts.append)
    bar = make_bar(total=3, desc="Processed prompts")
    bar.update(2)
    bar.update(1)
    bar.close()
    assert counts == [2, 1]
    assert bar.format_dict["elapsed"] >= 0  # vLLM reads it
    prompts = [1, 2]
    assert make_bar(prompts, desc="Adding requests") is prompts
    assert capsys.readouterr() == ("", "")
