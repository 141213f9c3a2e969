"""eval: lm-eval's scores on local datasets, and divergence from the teacher against plain forward passes."""

import math
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import nltk
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig

from tests.helpers.adapters import save_adapter
from tests.helpers.logits import bare_logits
from tests.helpers.models import save_tiny_model
from tests.helpers.prompts import write_prompts
from tsdkd.artifacts.reader import Artifact, check_parents, read_artifact, verify_artifact
from tsdkd.core import entropy
from tsdkd.errors import ArtifactError, InputError, TsdkdError
from tsdkd.stages.config.eval import EvalConfig
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.engines.transformers_engine import sample_responses
from tsdkd.stages.eval import stage
from tsdkd.stages.eval.stage import evaluate
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.models.load import load_model
from tsdkd.stages.models.tokenizers import chat_token_ids, load_tokenizer
from tsdkd.stages.results.benchmarks import EMBEDDED_DATA, choose_benchmarks
from tsdkd.stages.score.stage import score


@pytest.fixture(scope="module")
def held_out(student: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with the teacher's own responses."""
    directory = tmp_path_factory.mktemp("held_out")
    prompts = write_prompts(directory / "prompts.jsonl", 6)
    config = GenerateConfig(policy="teacher", max_new_tokens=9)
    generate(prompts, None, directory / "rollouts", config, teachers={"": str(teacher)})
    score(directory / "rollouts", str(student), str(teacher), directory / "scores", ScoreConfig(k=4))
    return directory


def test_the_embedded_benchmark_compares_log_likelihoods(student: Path, tmp_path: Path) -> None:
    artifact = evaluate(str(student), tmp_path / "r", EvalConfig(("embedded",), limit=12))
    language_model = load_model(str(student))
    correct = []
    for document in pq.read_table(EMBEDDED_DATA / "benchmark.parquet").to_pylist()[:12]:
        messages = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": document["prompt"]}]
        prompt = chat_token_ids(language_model.tokenizer, messages)
        prompt += language_model.tokenizer(document["beginning"], add_special_tokens=False).input_ids
        likelihoods = {}
        for choice in document["choices"]:
            continuation = language_model.tokenizer(" " + choice, add_special_tokens=False).input_ids
            with torch.no_grad():
                log_probs = language_model.model(torch.tensor([prompt + continuation])).logits[0].log_softmax(-1)
            likelihoods[choice] = sum(log_probs[len(prompt) - 1 + i, t].item() for i, t in enumerate(continuation))
        correct.append(max(likelihoods, key=lambda choice: likelihoods[choice]) == document["answer"])
    found = artifact.manifest.summary["embedded"]
    mean = sum(correct) / 12
    assert 0 < mean < 1
    assert found["value"] == pytest.approx(mean)
    assert found["stderr"] == pytest.approx(math.sqrt(mean * (1 - mean) / 11))
    assert found["documents"] == 12
    samples = artifact.table().to_pylist()
    assert [bool(row["score"]) for row in samples] == correct
    assert "What" in samples[0]["prompt"] or "Where" in samples[0]["prompt"]


def test_a_benchmark_with_a_token_that_the_model_does_not_know_is_refused(student: Path, tmp_path: Path) -> None:
    model = shutil.copytree(student, tmp_path / "model")
    tokenizer = load_tokenizer(str(model))
    tokenizer.add_tokens([*(f"<{i}>" for i in range(64)), "the"])  # past the padding rows of the head
    tokenizer.save_pretrained(model)
    with pytest.raises(InputError, match="contain the id"):
        evaluate(str(model), tmp_path / "r", EvalConfig(("embedded",), limit=6))


def test_divergence_equals_that_of_plain_forward_passes(
    held_out: Path, student: Path, teacher: Path, tmp_path: Path
) -> None:
    artifact = evaluate(str(student), tmp_path / "r", EvalConfig(("embedded",), limit=2), held_out=held_out)
    models = load_model(str(student)), load_model(str(teacher))
    divergence, agreement, entropies = [], [], []
    for row in read_artifact(held_out / "rollouts", "rollouts").table().to_pylist():
        q, p = (bare_logits(model, row) for model in models)
        divergence.append(torch.nn.functional.kl_div(q.log_softmax(-1), p.softmax(-1), reduction="none").sum(-1))
        agreement.append(q.argmax(-1) == p.argmax(-1))
        entropies.append(entropy(q))
    found = artifact.manifest.summary["held_out"]
    tokens = torch.cat(divergence)
    assert found["tokens"] == len(tokens)
    assert found["kl"] == pytest.approx(tokens.mean().item(), rel=1e-4)
    assert found["top1_agreement"] == pytest.approx(torch.cat(agreement).float().mean().item())
    assert found["entropy"] == pytest.approx(torch.cat(entropies).mean().item(), rel=1e-4)
    residuals = [(d.sum() - tokens.mean() * len(d)).item() for d in divergence]  # of a ratio estimator, by response
    spread = sum(r * r for r in residuals) * len(residuals) / (len(residuals) - 1)
    assert found["kl_stderr"] == pytest.approx(math.sqrt(spread) / len(tokens), rel=1e-3)
    assert found["response"]


def test_the_teacher_does_not_diverge_from_itself(held_out: Path, teacher: Path, tmp_path: Path) -> None:
    artifact = evaluate(str(teacher), tmp_path / "r", EvalConfig(("embedded",), limit=2), held_out=held_out)
    found = artifact.manifest.summary["held_out"]
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    assert found["top1_agreement"] == 1
    assert found["entropy"] == pytest.approx(found["teacher_entropy"])


def test_a_complete_benchmark_is_skipped(
    student: Path, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stage.harness, "run_benchmark", interrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluate(str(student), tmp_path / "r", EvalConfig(("embedded",), limit=2), held_out=held_out)
    monkeypatch.undo()
    monkeypatch.setattr(stage, "measure_held_out", interrupt)  # measured before the interruption
    artifact = evaluate(str(student), tmp_path / "r", EvalConfig(("embedded",), limit=2), held_out=held_out)
    assert set(artifact.manifest.summary) == {"held_out", "embedded"}


def test_benchmarks_are_added_to_existing_results(
    four_benchmarks: Artifact, student: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second benchmark joins a complete one; evaluating the first alone removes nothing."""

    def measure(*tasks: str) -> Artifact:
        return evaluate(str(student), tmp_path / "r", replace(FOUR, tasks=tasks), rows)

    measure("sciq")
    before = (tmp_path / "r" / "sciq.json").stat().st_mtime_ns
    both = measure("gsm8k")
    assert (tmp_path / "r" / "sciq.json").stat().st_mtime_ns == before
    verify_artifact(tmp_path / "r")
    assert both.manifest.config["tasks"] == ["gsm8k", "sciq"]
    assert {parent.kind for parent in both.manifest.parents} == {"gsm8k rows", "sciq rows"}
    assert both.manifest.summary == {name: four_benchmarks.manifest.summary[name] for name in ("gsm8k", "sciq")}
    monkeypatch.setattr(stage.harness, "run_benchmark", None)
    assert measure("sciq").manifest == both.manifest
    other = shutil.copytree(rows, tmp_path / "other")
    (other / "sciq" / "README.md").write_text((rows / "sciq" / "README.md").read_text() + "changed")
    with pytest.raises(ArtifactError, match="parent sciq rows was"):
        evaluate(str(student), tmp_path / "r", replace(FOUR, tasks=("sciq", "mbpp")), other, allow_code_execution=True)
    with pytest.raises(ArtifactError, match="measured without --limit; this command measures with --limit 2"):
        evaluate(str(student), tmp_path / "r", replace(FOUR, tasks=("embedded",), limit=2))


def test_other_options_than_those_of_existing_results_are_refused_in_words(
    student: Path, rows: Path, tmp_path: Path
) -> None:
    config = replace(FOUR, tasks=("sciq",), limit=2)
    before = evaluate(str(student), tmp_path / "r", config, rows).manifest
    with pytest.raises(ArtifactError) as caught:
        evaluate(str(student), tmp_path / "r", replace(config, limit=3, chat_template=False), rows)
    assert caught.value.cause == (
        f"The results at {tmp_path / 'r'} were measured with --limit 2 and without --chat; "
        "this command measures with --limit 3 and with --no-chat."
    )
    assert "--results" in caught.value.remedy
    assert "--overwrite" in caught.value.remedy
    assert read_artifact(tmp_path / "r", "results").manifest == before


def test_results_record_the_libraries_that_make_them(four_benchmarks: Artifact) -> None:
    libraries = four_benchmarks.manifest.libraries
    for name in ("lm_eval", "datasets", "math-verify", "torch"):
        assert libraries[name] == version(name)
    assert "vllm" not in libraries
    assert four_benchmarks.manifest.engine == "lm-eval on transformers"


def test_partial_results_of_another_lm_eval_are_not_resumed(
    student: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sciq = replace(FOUR, tasks=("sciq",))
    evaluate(str(student), tmp_path / "r", sciq, rows)
    monkeypatch.setattr(stage.harness, "version", lambda _: "0.0")
    evaluate(str(student), tmp_path / "r", sciq, rows)  # complete: nothing to do
    with pytest.raises(ArtifactError, match=r"'lm_eval': '0\.0'"):
        evaluate(str(student), tmp_path / "r", replace(FOUR, tasks=("sciq", "gsm8k")), rows)


def test_an_interrupted_benchmark_may_be_omitted(
    student: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_benchmark = stage.harness.run_benchmark

    def interrupt_sciq(model: object, name: str, benchmark: object, *more: object) -> object:
        if benchmark.name == "sciq":
            raise KeyboardInterrupt
        return run_benchmark(model, name, benchmark, *more)

    monkeypatch.setattr(stage.harness, "run_benchmark", interrupt_sciq)
    with pytest.raises(KeyboardInterrupt):
        evaluate(str(student), tmp_path / "r", replace(FOUR, tasks=("gsm8k", "sciq")), rows)
    alone = evaluate(str(student), tmp_path / "r", replace(FOUR, tasks=("gsm8k",)), rows)
    assert list(alone.manifest.summary) == ["gsm8k"]


def test_held_out_scores_without_hidden_states_are_refused(
    held_out: Path, student: Path, teacher: Path, tmp_path: Path
) -> None:
    shutil.copytree(held_out / "rollouts", tmp_path / "h" / "rollouts")
    config = ScoreConfig(k=4, signal="ranks")
    score(tmp_path / "h" / "rollouts", str(student), str(teacher), tmp_path / "h" / "scores", config)
    with pytest.raises(InputError, match="'ranks'"):
        evaluate(str(student), tmp_path / "r", EvalConfig(("embedded",), limit=2), held_out=tmp_path / "h")
    assert not (tmp_path / "r").exists()


@pytest.fixture(scope="module")
def four_benchmarks(student: Path, rows: Path, punkt: None, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Every output type of lm-eval, on synthetic datasets."""
    return evaluate(str(student), tmp_path_factory.mktemp("eval") / "r", FOUR, data=rows, allow_code_execution=True)


FOUR = EvalConfig(("gsm8k", "sciq", "mbpp", "ifeval"), max_new_tokens=12, dtype="float32")


def test_samples_hold_prompt_response_extraction_and_target(four_benchmarks: Artifact) -> None:
    samples = four_benchmarks.table().to_pylist()
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
    second = {row["task"]: row for row in samples if row["document"] == 1}
    assert second["gsm8k"]["prompt"].count("Question:") == 6  # five shots
    assert second["gsm8k"]["target"] == "Double. #### 2"
    assert second["sciq"]["target"] == "animal 1"
    likelihoods = {
        line.split(" ", 1)[1]: float(line.split(" ", 1)[0]) for line in second["sciq"]["response"].splitlines()
    }
    assert set(likelihoods) == {"stone", "cloud", "river", "animal 1"}
    by_length = max(likelihoods, key=lambda choice: likelihoods[choice] / len(choice))
    assert (second["sciq"]["metric"], second["sciq"]["extracted"]) == ("acc_norm,none", by_length)
    assert second["mbpp"]["prompt"].endswith("```python\n")  # the response begins inside the block


def test_responses_are_greedy_and_truncated_ones_are_counted(four_benchmarks: Artifact, student: Path) -> None:
    language_model = load_model(str(student), "float32")
    rows = [row for row in four_benchmarks.table().to_pylist() if row["metric"] == "inst_level_strict_acc,none"]
    truncated = 0
    for row in rows:
        ids = language_model.tokenizer(row["prompt"], add_special_tokens=False).input_ids
        (response,) = sample_responses(language_model, [ids], 12, temperature=0)
        assert language_model.tokenizer.decode(response, skip_special_tokens=True) == row["response"]
        assert row["truncated"] == (response[-1] not in language_model.end_ids)
        truncated += row["truncated"]
    assert four_benchmarks.manifest.summary["ifeval"]["truncated"] == truncated


def test_end_and_padding_tokens_may_be_missing(student: Path, rows: Path, tmp_path: Path) -> None:
    """A padding token without a row in the head; an end token in the generation config alone, or nowhere."""
    short = save_tiny_model(tmp_path / "short", seed=1, padding_rows=-1, extra=("<|padding|>",))
    end_in_config = shutil.copytree(student, tmp_path / "end-in-config")
    for model, names in (
        (short, {"pad_token": "<|padding|>"}),
        (end_in_config, {"pad_token": None, "eos_token": None}),
    ):
        tokenizer = load_tokenizer(str(model))
        for name, token in names.items():
            setattr(tokenizer, name, token)
        tokenizer.save_pretrained(model)
        config = EvalConfig(tasks=("gsm8k",), max_new_tokens=4, limit=2)
        assert evaluate(str(model), tmp_path / "r" / model.name, config, data=rows).manifest.summary
    (end_in_config / "generation_config.json").write_text("{}")
    with pytest.raises(InputError, match="no end token, so its responses to gsm8k would not end"):
        evaluate(str(end_in_config), tmp_path / "refused", config, data=rows)
    assert not (tmp_path / "refused").exists()


def test_a_models_own_sampling_settings_do_not_apply(
    four_benchmarks: Artifact, student: Path, rows: Path, tmp_path: Path
) -> None:
    """Qwen2.5-Instruct comes with a repetition penalty, which would count the shots as repeated."""
    penalised = shutil.copytree(student, tmp_path / "penalised")
    settings = GenerationConfig.from_pretrained(student)
    settings.repetition_penalty = 9.0
    settings.save_pretrained(penalised)
    artifact = evaluate(str(penalised), tmp_path / "r", replace(FOUR, tasks=("gsm8k",)), rows)
    plain = [row for row in four_benchmarks.table().to_pylist() if row["task"] == "gsm8k"]
    assert artifact.table().to_pylist() == plain


@pytest.mark.parametrize("batch_size", [1, 3])
def test_results_do_not_depend_on_the_batch_size(
    four_benchmarks: Artifact, student: Path, rows: Path, punkt: None, tmp_path: Path, batch_size: int
) -> None:
    config = replace(FOUR, batch_size=batch_size)
    again = evaluate(str(student), tmp_path / "r", config, data=rows, allow_code_execution=True)
    assert again.manifest.summary == four_benchmarks.manifest.summary
    assert again.table().drop_columns("response").equals(four_benchmarks.table().drop_columns("response"))


def test_truncated_prompts_are_counted(student: Path, rows: Path, tmp_path: Path) -> None:
    config = EvalConfig(("gsm8k", "sciq"), max_new_tokens=4, max_length=70)
    summary = evaluate(str(student), tmp_path / "r", config, data=rows).manifest.summary
    assert summary["gsm8k"]["prompts_truncated"] == 6  # a byte is a token
    assert summary["sciq"]["prompts_truncated"] == 6


def test_a_limit_that_leaves_no_space_for_the_prompt_is_refused(student: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="up to 512 tokens, but the context has 512") as caught:
        evaluate(str(student), tmp_path / "r", EvalConfig(("gsm8k",)), data=rows)
    assert "--max-new-tokens" in caught.value.remedy
    assert not (tmp_path / "r").exists()


def test_a_context_that_is_shorter_than_a_choice_ends_in_words(student: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(TsdkdError, match="cannot run sciq in a context of 3 tokens") as caught:
        evaluate(str(student), tmp_path / "r", EvalConfig(("sciq",), max_length=3, limit=2), data=rows)
    assert "--max-length" in caught.value.remedy


def test_the_chat_template_can_be_switched_off(
    four_benchmarks: Artifact, student: Path, rows: Path, tmp_path: Path
) -> None:
    config = EvalConfig(("sciq",), chat_template=False)
    artifact = evaluate(str(student), tmp_path / "r", config, data=rows)
    assert four_benchmarks.manifest.summary["sciq"]["chat_template"]
    assert not artifact.manifest.summary["sciq"]["chat_template"]
    assert artifact.table()["prompt"][0].as_py().startswith("Legs are counted.")


def test_a_missing_chat_template_is_refused(student: Path, rows: Path, tmp_path: Path) -> None:
    base = shutil.copytree(student, tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    assert not evaluate(str(base), tmp_path / "r", EvalConfig(("sciq",)), rows).manifest.summary["sciq"][
        "chat_template"
    ]
    with pytest.raises(InputError, match="has no chat template"):
        evaluate(str(base), tmp_path / "s", EvalConfig(("sciq",), chat_template=True), rows)


def test_an_adapter_gives_the_results_of_its_merged_weights(
    four_benchmarks: Artifact, student: Path, rows: Path, tmp_path: Path
) -> None:
    adapter = save_adapter(student, tmp_path / "adapter")
    merged = shutil.copytree(student, tmp_path / "merged")
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(student), adapter)
    tuned.merge_and_unload().save_pretrained(merged)
    config = replace(FOUR, tasks=("gsm8k", "sciq"))
    one, other = (evaluate(str(path), tmp_path / f"of-{path.name}", config, rows) for path in (adapter, merged))
    assert one.manifest.summary == other.manifest.summary
    responses = [
        [row["response"] for row in found.table().to_pylist() if row["task"] == "gsm8k"]
        for found in (one, other, four_benchmarks)
    ]
    assert responses[0] == responses[1] != responses[2]


def test_a_launcher_is_refused(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="tsdkd eval starts its processes itself"):
        evaluate(str(student), tmp_path / "r", EvalConfig(("embedded",)))


def test_local_datasets_are_parents_of_results(four_benchmarks: Artifact, rows: Path) -> None:
    kinds = {parent.kind for parent in four_benchmarks.manifest.parents}
    assert kinds == {"gsm8k rows", "sciq rows", "mbpp rows", "ifeval rows"}
    _, outside_the_run = verify_artifact(four_benchmarks.path)
    assert {parent.kind for parent in outside_the_run} == kinds
    card = rows / "sciq" / "README.md"
    before = card.read_text()
    card.write_text(before + "changed")
    parents = check_parents(four_benchmarks.path, four_benchmarks.manifest, Path("/"))
    assert [parent.kind for parent, _, unchanged in parents if not unchanged] == ["sciq rows"]
    card.write_text(before)


def test_datasets_of_the_same_name_are_not_confused(student: Path, rows: Path, tmp_path: Path) -> None:
    shutil.copytree(rows, tmp_path / "data")
    table = pq.read_table(rows / "sciq" / "test.parquet").slice(0, 2)
    pq.write_table(table, tmp_path / "data" / "sciq" / "test.parquet")
    for data, documents in ((rows, 6), (tmp_path / "data", 2)):
        artifact = evaluate(str(student), tmp_path / f"r{documents}", EvalConfig(("sciq",)), data=data)
        assert artifact.manifest.summary["sciq"]["documents"] == documents


def test_the_papers_ten_on_real_data(student: Path, real_data: Path, punkt: None, tmp_path: Path) -> None:
    ten = tuple(benchmark.name for benchmark in choose_benchmarks(["all", "gsm-plus:mini"]))
    config = EvalConfig(ten, limit=2, max_new_tokens=4)
    artifact = evaluate(str(student), tmp_path / "r", config, data=real_data / "benchmarks", allow_code_execution=True)
    assert list(artifact.manifest.summary) == list(ten)
    assert {found["documents"] for found in artifact.manifest.summary.values()} == {2}


def test_local_datasets_and_models_need_no_network(student: Path, rows: Path, punkt: None, tmp_path: Path) -> None:
    """From the first import on, the process resolves no name and opens no connection."""
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
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "network:" not in done.stdout
    assert "ifeval" in done.stdout
