"""eval: lm-eval's numbers on local rows, and closeness to the teacher against bare forwards."""

import math
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import nltk
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig

from tests.helpers.prompts import write_prompts
from tests.stages.models.test_adapters import save_adapter
from tests.stages.score.test_score import bare_logits
from tsdkd.artifacts.reader import Artifact, read_artifact, verify_artifact
from tsdkd.core import entropy
from tsdkd.errors import ArtifactError, InputError
from tsdkd.stages.config.eval import EvalConfig
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.engines.transformers_engine import sample_responses
from tsdkd.stages.eval import stage
from tsdkd.stages.eval.stage import evaluate
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.models.load import load_model
from tsdkd.stages.models.tokenizers import chat_token_ids
from tsdkd.stages.results.benchmarks import EMBEDDED_DATA, choose_benchmarks
from tsdkd.stages.score.stage import score


@pytest.fixture(scope="module")
def held_out(student: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with the teacher's own responses."""
    place = tmp_path_factory.mktemp("held_out")
    prompts = write_prompts(place / "prompts.jsonl", 6)
    generate(prompts, str(teacher), place / "rollouts", GenerateConfig(policy="teacher", max_new_tokens=9))
    score(place / "rollouts", str(student), str(teacher), place / "scores", ScoreConfig(k=4))
    return place


def test_the_embedded_benchmark_is_which_value_is_likelier(student: Path, tmp_path: Path) -> None:
    artifact = evaluate(str(student), tmp_path / "r", EvalConfig(("embedded",), limit=12))
    reader = load_model(str(student))
    right = []
    for document in pq.read_table(EMBEDDED_DATA / "benchmark.parquet").to_pylist()[:12]:
        asked = chat_token_ids(reader.tokenizer, [{"role": "user", "content": document["prompt"]}])
        asked += reader.tokenizer(document["beginning"], add_special_tokens=False).input_ids
        likely = {}
        for choice in document["choices"]:
            continuation = reader.tokenizer(" " + choice, add_special_tokens=False).input_ids
            with torch.no_grad():
                log_q = reader.model(torch.tensor([asked + continuation])).logits[0].log_softmax(-1)
            likely[choice] = sum(log_q[len(asked) - 1 + i, token].item() for i, token in enumerate(continuation))
        right.append(max(likely, key=lambda choice: likely[choice]) == document["answer"])
    found = artifact.manifest.summary["embedded"]
    mean = sum(right) / 12
    assert 0 < mean < 1
    assert found["value"] == pytest.approx(mean)
    assert found["stderr"] == pytest.approx(math.sqrt(mean * (1 - mean) / 11))
    assert found["documents"] == 12
    samples = artifact.table().to_pylist()
    assert [bool(row["score"]) for row in samples] == right
    assert "What" in samples[0]["prompt"] or "Where" in samples[0]["prompt"]


def test_closeness_is_what_bare_forwards_say(held_out: Path, student: Path, teacher: Path, tmp_path: Path) -> None:
    artifact = evaluate(str(student), tmp_path / "r", EvalConfig(("embedded",), limit=2), held_out=held_out)
    readers = load_model(str(student)), load_model(str(teacher))
    divergence, agreement, entropies = [], [], []
    for row in read_artifact(held_out / "rollouts", "rollouts").table().to_pylist():
        q, p = (bare_logits(reader, row) for reader in readers)
        divergence.append(torch.nn.functional.kl_div(q.log_softmax(-1), p.softmax(-1), reduction="none").sum(-1))
        agreement.append(q.argmax(-1) == p.argmax(-1))
        entropies.append(entropy(q))
    found = artifact.manifest.summary["held_out"]
    tokens = torch.cat(divergence)
    assert found["tokens"] == len(tokens)
    assert found["kl"] == pytest.approx(tokens.mean().item(), rel=1e-4)
    assert found["agreement"] == pytest.approx(torch.cat(agreement).float().mean().item())
    assert found["entropy"] == pytest.approx(torch.cat(entropies).mean().item(), rel=1e-4)
    residuals = [(d.sum() - tokens.mean() * len(d)).item() for d in divergence]  # of a ratio estimator, by response
    spread = sum(r * r for r in residuals) * len(residuals) / (len(residuals) - 1)
    assert found["kl_stderr"] == pytest.approx(math.sqrt(spread) / len(tokens), rel=1e-3)
    assert found["answer"]


def test_the_teacher_has_no_divergence_from_itself(held_out: Path, teacher: Path, tmp_path: Path) -> None:
    artifact = evaluate(str(teacher), tmp_path / "r", EvalConfig(("embedded",), limit=2), held_out=held_out)
    found = artifact.manifest.summary["held_out"]
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    assert found["agreement"] == 1
    assert found["entropy"] == pytest.approx(found["teacher_entropy"])


def test_a_finished_benchmark_is_not_run_again(
    student: Path, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stage.harness, "run_benchmark", broken)
    with pytest.raises(KeyboardInterrupt):
        evaluate(str(student), tmp_path / "r", EvalConfig(("embedded",), limit=2), held_out=held_out)
    monkeypatch.undo()
    monkeypatch.setattr(stage, "measure_held_out", broken)  # measured before the interruption
    artifact = evaluate(str(student), tmp_path / "r", EvalConfig(("embedded",), limit=2), held_out=held_out)
    assert set(artifact.manifest.summary) == {"held_out", "embedded"}


def test_benchmarks_are_added_to_results_that_are_there(
    made_up: Artifact, student: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is finished; another is added to it, and asking for the first alone takes nothing away."""

    def measure(*tasks: str) -> Artifact:
        return evaluate(str(student), tmp_path / "r", replace(FOUR, tasks=tasks), rows)

    measure("sciq")
    before = (tmp_path / "r" / "sciq.json").stat().st_mtime_ns
    both = measure("gsm8k")
    assert (tmp_path / "r" / "sciq.json").stat().st_mtime_ns == before
    verify_artifact(tmp_path / "r")
    assert both.manifest.config["tasks"] == ["gsm8k", "sciq"]
    assert {parent.kind for parent in both.manifest.parents} == {"gsm8k rows", "sciq rows"}
    assert both.manifest.summary == {name: made_up.manifest.summary[name] for name in ("gsm8k", "sciq")}
    monkeypatch.setattr(stage.harness, "run_benchmark", None)
    assert measure("sciq").manifest == both.manifest
    other = shutil.copytree(rows, tmp_path / "other")
    (other / "sciq" / "README.md").write_text((rows / "sciq" / "README.md").read_text() + "changed")
    with pytest.raises(ArtifactError, match="parent sciq rows was"):
        evaluate(str(student), tmp_path / "r", replace(FOUR, tasks=("sciq", "mbpp")), other, allow_code_execution=True)
    with pytest.raises(ArtifactError, match=r"config.limit was None, now 2\."):
        evaluate(str(student), tmp_path / "r", replace(FOUR, tasks=("embedded",), limit=2))


def test_a_benchmark_that_was_not_finished_may_be_left_out(
    student: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = stage.harness.run_benchmark

    def ask(model: object, name: str, benchmark: object, *more: object) -> object:
        if benchmark.name == "sciq":
            raise KeyboardInterrupt
        return known(model, name, benchmark, *more)

    monkeypatch.setattr(stage.harness, "run_benchmark", ask)
    with pytest.raises(KeyboardInterrupt):
        evaluate(str(student), tmp_path / "r", replace(FOUR, tasks=("gsm8k", "sciq")), rows)
    alone = evaluate(str(student), tmp_path / "r", replace(FOUR, tasks=("gsm8k",)), rows)
    assert list(alone.manifest.summary) == ["gsm8k"]


def test_light_heldout_scores_are_refused(held_out: Path, student: Path, teacher: Path, tmp_path: Path) -> None:
    shutil.copytree(held_out / "rollouts", tmp_path / "h" / "rollouts")
    config = ScoreConfig(k=4, signal="ranks")
    score(tmp_path / "h" / "rollouts", str(student), str(teacher), tmp_path / "h" / "scores", config)
    with pytest.raises(InputError, match="'ranks'"):
        evaluate(str(student), tmp_path / "r", EvalConfig(("embedded",), limit=2), held_out=tmp_path / "h")
    assert not (tmp_path / "r").exists()


@pytest.fixture(scope="module")
def made_up(student: Path, rows: Path, punkt: None, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Every output type on made-up rows."""
    return evaluate(str(student), tmp_path_factory.mktemp("eval") / "r", FOUR, data=rows, allow_code_execution=True)


FOUR = EvalConfig(("gsm8k", "sciq", "mbpp", "ifeval"), max_new_tokens=12, dtype="float32")


def test_samples_say_what_was_asked_answered_extracted_and_right(made_up: Artifact) -> None:
    samples = made_up.table().to_pylist()
    assert Counter((row["task"], row["metric"]) for row in samples) == {
        ("gsm8k", "exact_match,flexible-extract"): 6,
        ("gsm8k", "exact_match,strict-match"): 6,
        ("sciq", "acc,none"): 6,
        ("sciq", "acc_norm,none"): 6,
        ("mbpp", "pass_at_1,extract_code"): 4,
        **{
            ("ifeval", f"{level}_level_{how}_acc,none"): 2
            for level in ("inst", "prompt")
            for how in ("strict", "loose")
        },
    }
    asked = {row["task"]: row for row in samples if row["document"] == 1}
    assert asked["gsm8k"]["prompt"].count("Question:") == 6  # five shots
    assert asked["gsm8k"]["target"] == "Double. #### 2"
    assert asked["sciq"]["target"] == "animal 1"
    likelihoods = {line.split(" ", 1)[1]: float(line.split(" ", 1)[0]) for line in asked["sciq"]["answer"].splitlines()}
    assert set(likelihoods) == {"stone", "cloud", "river", "animal 1"}
    by_length = max(likelihoods, key=lambda choice: likelihoods[choice] / len(choice))
    assert (asked["sciq"]["metric"], asked["sciq"]["extracted"]) == ("acc_norm,none", by_length)
    assert asked["mbpp"]["prompt"].endswith("```python\n")  # the answer begins inside the block


def test_answers_are_greedy_and_cut_ones_are_counted(made_up: Artifact, student: Path) -> None:
    reader = load_model(str(student), "float32")
    rows = [row for row in made_up.table().to_pylist() if row["metric"] == "inst_level_strict_acc,none"]
    cut = 0
    for row in rows:
        ids = reader.tokenizer(row["prompt"], add_special_tokens=False).input_ids
        (answer,) = sample_responses(reader, [ids], 12, temperature=0)
        assert reader.tokenizer.decode(answer, skip_special_tokens=True) == row["answer"]
        assert row["truncated"] == (answer[-1] not in reader.end_ids)
        cut += row["truncated"]
    assert made_up.manifest.summary["ifeval"]["truncated"] == cut


def test_a_models_own_sampling_settings_step_aside(
    made_up: Artifact, student: Path, rows: Path, tmp_path: Path
) -> None:
    """Qwen2.5-Instruct comes with a repetition penalty, which would count the shots as repeated."""
    penalised = shutil.copytree(student, tmp_path / "penalised")
    settings = GenerationConfig.from_pretrained(student)
    settings.repetition_penalty = 9.0
    settings.save_pretrained(penalised)
    artifact = evaluate(str(penalised), tmp_path / "r", replace(FOUR, tasks=("gsm8k",)), rows)
    plain = [row for row in made_up.table().to_pylist() if row["task"] == "gsm8k"]
    assert artifact.table().to_pylist() == plain


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_result_does_not_depend_on_the_batch_and_is_the_same_twice(
    made_up: Artifact, student: Path, rows: Path, punkt: None, tmp_path: Path, batch_size: int
) -> None:
    config = replace(FOUR, batch_size=batch_size)
    again = evaluate(str(student), tmp_path / "r", config, data=rows, allow_code_execution=True)
    assert again.manifest.summary == made_up.manifest.summary
    assert again.table().drop_columns("answer").equals(made_up.table().drop_columns("answer"))


def test_prompts_that_lose_their_beginning_are_counted(student: Path, rows: Path, tmp_path: Path) -> None:
    config = EvalConfig(("gsm8k", "sciq"), max_new_tokens=4, max_length=70)
    summary = evaluate(str(student), tmp_path / "r", config, data=rows).manifest.summary
    assert summary["gsm8k"]["prompts_cut"] == 6  # a byte is a token
    assert summary["sciq"]["prompts_cut"] == 6


def test_answers_that_leave_no_room_for_a_prompt_are_refused(student: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="up to 512 tokens; prompt and answer together have 512") as caught:
        evaluate(str(student), tmp_path / "r", EvalConfig(("gsm8k",)), data=rows)
    assert "--max-new-tokens" in caught.value.remedy
    assert not (tmp_path / "r").exists()


def test_base_models_are_asked_without_a_template(made_up: Artifact, student: Path, rows: Path, tmp_path: Path) -> None:
    config = EvalConfig(("sciq",), chat_template=False)
    artifact = evaluate(str(student), tmp_path / "r", config, data=rows)
    assert made_up.manifest.summary["sciq"]["chat_template"]
    assert not artifact.manifest.summary["sciq"]["chat_template"]
    assert artifact.table()["prompt"][0].as_py().startswith("Legs are counted.")


def test_a_template_that_is_not_there_is_refused(student: Path, rows: Path, tmp_path: Path) -> None:
    base = shutil.copytree(student, tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    assert not evaluate(str(base), tmp_path / "r", EvalConfig(("sciq",)), rows).manifest.summary["sciq"][
        "chat_template"
    ]
    with pytest.raises(InputError, match="has no chat template"):
        evaluate(str(base), tmp_path / "s", EvalConfig(("sciq",), chat_template=True), rows)


def test_an_adapter_is_measured_as_its_merged_weights(
    made_up: Artifact, student: Path, rows: Path, tmp_path: Path
) -> None:
    adapter = save_adapter(student, tmp_path / "adapter")
    merged = shutil.copytree(student, tmp_path / "merged")
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(student), adapter)
    tuned.merge_and_unload().save_pretrained(merged)
    config = replace(FOUR, tasks=("gsm8k", "sciq"))
    one, other = (evaluate(str(path), tmp_path / f"of-{path.name}", config, rows) for path in (adapter, merged))
    assert one.manifest.summary == other.manifest.summary
    answers = [
        [row["answer"] for row in found.table().to_pylist() if row["task"] == "gsm8k"]
        for found in (one, other, made_up)
    ]
    assert answers[0] == answers[1] != answers[2]


def test_several_processes_are_refused(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="one process"):
        evaluate(str(student), tmp_path / "r", EvalConfig(("embedded",)))


def test_results_know_the_rows_they_were_measured_on(made_up: Artifact, rows: Path) -> None:
    kinds = {parent.kind for parent in made_up.manifest.parents}
    assert kinds == {"gsm8k rows", "sciq rows", "mbpp rows", "ifeval rows"}
    verify_artifact(made_up.path)
    card = rows / "sciq" / "README.md"
    before = card.read_text()
    card.write_text(before + "changed")
    with pytest.raises(ArtifactError, match="sciq rows"):
        verify_artifact(made_up.path)
    card.write_text(before)


def test_rows_of_another_folder_with_the_same_name_are_not_taken(student: Path, rows: Path, tmp_path: Path) -> None:
    shutil.copytree(rows, tmp_path / "data")
    table = pq.read_table(rows / "sciq" / "test.parquet").slice(0, 2)
    pq.write_table(table, tmp_path / "data" / "sciq" / "test.parquet")
    for place, documents in ((rows, 6), (tmp_path / "data", 2)):
        artifact = evaluate(str(student), tmp_path / f"r{documents}", EvalConfig(("sciq",)), data=place)
        assert artifact.manifest.summary["sciq"]["documents"] == documents


def test_the_ten_on_real_rows(student: Path, shared: Path, punkt: None, tmp_path: Path) -> None:
    ten = tuple(benchmark.name for benchmark in choose_benchmarks(["all", "gsm-plus:mini"]))
    config = EvalConfig(ten, limit=2, max_new_tokens=4)
    artifact = evaluate(str(student), tmp_path / "r", config, data=shared / "benchmarks", allow_code_execution=True)
    assert list(artifact.manifest.summary) == list(ten)
    assert {found["documents"] for found in artifact.manifest.summary.values()} == {2}


def test_local_rows_and_models_need_no_network(student: Path, rows: Path, punkt: None, tmp_path: Path) -> None:
    """Nothing is looked up and nothing connected to, from the first import on."""
    program = (
        "import sys\n"
        "def refuse(event, args):\n"
        "    if event in ('socket.getaddrinfo', 'socket.connect', 'socket.gethostbyname', 'socket.sendto'):\n"
        "        print('network:', event, args)\n"
        "sys.addaudithook(refuse)\n"
        "import nltk\n"
        f"nltk.data.path = {nltk.data.path!r}\n"
        "from tsdkd.cli import main\n"
        "main()\n"
    )
    words = [
        "eval",
        "--model",
        f"m={student}",
        "--tasks",
        "gsm8k,sciq,mbpp,ifeval",
        "--data",
        str(rows),
        "--limit",
        "2",
    ]
    words += ["--max-new-tokens", "4", "--allow-code-execution", "--results", str(tmp_path)]
    found = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "network:" not in found.stdout
    assert "ifeval" in found.stdout
