"""diagnose: files first, then one sampling; refusals become findings."""

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers.chat_templates import NO_SYSTEM, THINKING
from tests.helpers.models import CHAT, copy_with_ends, save_tiny_model
from tests.helpers.prompts import write_prompts
from tsdkd.stages.config.chat import ChatConfig
from tsdkd.stages.config.doctor import CPU_SAMPLE_TOKENS, DoctorConfig
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.doctor.findings import Finding
from tsdkd.stages.doctor.stage import diagnose
from tsdkd.stages.models import chat_rendering
from tsdkd.stages.observer import SilentObserver

CONFIG = DoctorConfig(sample=4, sampling=GenerateConfig(max_new_tokens=6, max_prompt_tokens=200))


class Labels(SilentObserver):
    """Keeps the labels of the progress bars."""

    def __init__(self) -> None:
        self.labels: list[str] = []

    def progress(
        self, label: str, total: int, unit: str, done: int = 0
    ) -> AbstractContextManager[Callable[[int], None]]:
        self.labels.append(label)
        return super().progress(label, total, unit, done)


def findings(student: Path, teacher: Path, prompts: Path, benchmarks: Path | None = None) -> dict[str, Finding]:
    return {f.name: f for f in diagnose(str(student), str(teacher), prompts, CONFIG, benchmarks).all}


def test_a_pair_is_examined_from_its_files_to_its_responses(
    student: Path, teacher: Path, rows: Path, tmp_path: Path
) -> None:
    """Each finding once, in the order of the checks."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "What is 3 times 2?"}\n{"prompt": "Hello"}\n{"prompt": ""}\n')
    observer = Labels()
    found = diagnose(str(student), str(teacher), prompts, CONFIG, rows, observer=observer)
    assert observer.labels == ["student responds", "teacher responds", "student and teacher read the responses"]
    names = [finding.name for finding in found.all]
    assert names == [
        *("models", "teacher_precision", "tokenizer", "vocabulary"),
        *("student_end_tokens", "student_pad_token", "student_begin_token"),
        *("teacher_end_tokens", "teacher_pad_token", "teacher_begin_token", "same_end_tokens"),
        *("chat_template", "system_role", "thinking_mode", "benchmarks", "prompts", "prompt_rendering", "context"),
        *("response_length", "repetition", "thoughts", "entropy", "gate", "opener", "topk_agreement"),
        *("outside_mass", "top1_in_candidates", "knowledge", "entropy_term"),
    ]
    by_name = {finding.name: finding for finding in found.all}
    assert not found.stops
    assert by_name["benchmarks"].values["overlaps"][0]["question"] == "What is 3 times 2?"
    assert by_name["prompts"].values["prompts"] == 2
    assert by_name["response_length"].values["limit"] == 6


def test_a_template_that_does_not_end_with_a_switch_becomes_findings(
    student: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_rendering, "SECONDS", 0.3)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    model = save_tiny_model(tmp_path / "model", seed=1)
    (model / "chat_template.jinja").write_text(f"{{% if thinking is defined %}}{loop}{{% endif %}}{{{{ messages }}}}")
    found = findings(model, student, prompts)["thinking_mode"]
    assert (found.status, found.reason) == ("stop", "The chat template does not end within 0.3 s.")


def test_refusals_become_findings_and_nothing_is_sampled(
    student: Path, other_family: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tsdkd.stages.doctor.stage.sample_both", lambda *_: pytest.fail("sampled"))
    found = findings(student, other_family, prompts)
    assert (found["tokenizer"].status, found["responses"].status) == ("stop", "look")
    assert found["responses"].reason.endswith("because of: tokenizer.")
    missing = findings(student, Path("none"), Path("none.jsonl"))
    assert {name: f.status for name, f in missing.items()} == {
        "teacher": "stop",
        "prompts": "stop",
        "responses": "look",
    }
    assert "The model directory" in missing["teacher"].reason or "not a local" in missing["teacher"].reason
    assert findings(student, student, prompts, benchmarks=student)["benchmarks"].status == "stop"


def test_a_base_student_with_an_instruct_teacher(teacher: Path, prompts: Path, tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", seed=2)
    (base / "chat_template.jinja").unlink()
    found = findings(base, teacher, prompts)
    assert found["chat_template"].status == "stop"
    assert "no chat template" in found["chat_template"].reason


def test_the_chat_format_of_the_run_is_examined(student: Path, teacher: Path, tmp_path: Path) -> None:
    """Both models have it; a teacher whose template does not read the keywords keeps its own, which is a finding."""
    thinking = shutil.copytree(student, tmp_path / "thinking")
    (thinking / "chat_template.jinja").write_text(THINKING)
    prompts = tmp_path / "prompts.jsonl"
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How?"}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in ({"messages": turns}, {"prompt": "What?"})))

    def found(chat: ChatConfig) -> dict[str, Finding]:
        diagnosed = diagnose(str(thinking), str(teacher), prompts, replace(CONFIG, chat=chat)).all
        return {finding.name: finding for finding in diagnosed}

    own = found(ChatConfig())
    off = found(ChatConfig(kwargs='{"enable_thinking": false}'))
    assert own["thinking_mode"].values == {"student": "on", "teacher": "none"}
    assert off["thinking_mode"].values == {"student": "off", "teacher": "none"}
    assert off["prompts"].values["prompt_tokens"] - own["prompts"].values["prompt_tokens"] == len(
        "<think>\n\n</think>\n\n"
    )
    assert own["prompts"].values["system_joined"] == 0
    file = tmp_path / "t.jinja"
    file.write_text(NO_SYSTEM)
    both = found(ChatConfig(str(file)))
    assert both["chat_template"].status == "ok"
    assert both["prompts"].values["system_joined"] == 1
    assert found(ChatConfig(kwargs='{"think": false}'))["student"].status == "stop"


def test_responses_end_at_end_tokens_of_both_models_and_at_stop_strings(
    student: Path, teacher: Path, prompts: Path, tmp_path: Path
) -> None:
    """The student has no end token that it writes; each byte ends the teacher's responses, or is a stop string."""
    silent = copy_with_ends(student, tmp_path / "student", [256])
    talker = copy_with_ends(teacher, tmp_path / "teacher", range(256))
    found = findings(silent, talker, prompts)
    assert found["same_end_tokens"].status == "ok"
    assert "Only the student ends with <|start|> (256) and only the teacher" in found["same_end_tokens"].reason
    assert found["response_length"].values["response_length"] == {"student": 1, "teacher": 1}
    assert found["response_length"].values["truncated"] == {"student": 0, "teacher": 0}
    printable = replace(CONFIG.sampling, stop=tuple(map(chr, range(32, 127))))
    stopped = diagnose(str(silent), str(teacher), prompts, replace(CONFIG, sampling=printable)).all
    (lengths,) = [f.values["response_length"] for f in stopped if f.name == "response_length"]
    whole = findings(silent, teacher, prompts)["response_length"].values["response_length"]
    assert lengths["student"] < whole["student"]


def test_one_model_in_both_roles_has_nothing_to_learn(student: Path, prompts: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(student)
    found = findings(student, link, prompts)
    assert found["models"].status == "stop"
    assert "They are the same model." in found["models"].reason
    assert "knowledge" not in found


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "names"),
    [
        (LOOP + CHAT, ["student"]),
        ("{% if messages[0]['role'] == 'system' %}" + LOOP + "{% endif %}" + CHAT, ["system_role"]),
        ("{% if enable_thinking %}" + LOOP + "{% endif %}" + CHAT, ["thinking_mode"]),
    ],
)
def test_a_chat_template_that_does_not_end_is_a_finding(
    template: str, names: list[str], teacher: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_rendering, "SECONDS", 0.2)
    endless = save_tiny_model(tmp_path / "endless", seed=1)
    (endless / "chat_template.jinja").write_text(template)
    found = diagnose(str(endless), str(teacher), prompts, CONFIG)
    assert [finding.name for finding in found.stops] == names
    assert "does not end" in found.stops[0].reason


def test_a_student_that_is_better_than_its_teacher(student: Path, prompts: Path, tmp_path: Path) -> None:
    """A sharp student and a small teacher that knows nothing: the pair is swapped."""
    good = save_tiny_model(tmp_path / "good", seed=1, layers=3)
    model = AutoModelForCausalLM.from_pretrained(good)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    model.save_pretrained(good)
    found = findings(good, student, prompts)
    assert found["models"].status == "look"
    assert found["entropy"].status == "look"
    assert (found["knowledge"].status, found["knowledge"].remedy) == ("stop", "Swap --student and --teacher.")
    assert findings(student, good, prompts)["knowledge"].status == "ok"


def test_long_responses_are_sampled_in_part_on_a_cpu() -> None:
    long = replace(CONFIG, sampling=GenerateConfig(max_new_tokens=512))
    assert (long.response_limit("cpu"), long.response_limit("cuda"), CONFIG.response_limit("cpu")) == (
        CPU_SAMPLE_TOKENS,
        512,
        6,
    )
    assert [replace(long, sample_tokens=n).response_limit("cpu") for n in (100, 1000)] == [100, 512]


def test_the_sample_depends_on_the_seed(student: Path, teacher: Path, tmp_path: Path) -> None:
    from tsdkd.stages.data.prompts import Prompts
    from tsdkd.stages.doctor.stage import _read_prompts

    source = Prompts(write_prompts(tmp_path / "p.jsonl", 20))
    samples = [[p.prompt_id for p in _read_prompts(source, 5, seed, None).sample] for seed in (0, 0, 1)]
    assert samples[0] == samples[1] != samples[2]
