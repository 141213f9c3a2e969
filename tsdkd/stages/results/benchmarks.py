"""The benchmarks by name: the paper's ten with their variants, the reasoning suite, and the embedded benchmark."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from tsdkd.errors import InputError
from tsdkd.stages.results.benchmark import Benchmark, FunctionName, extraction, mean_metrics
from tsdkd.stages.results.reasoning import REASONING_BENCHMARKS

EMBEDDED_DATA = Path(__file__).parents[1] / "data" / "embedded"
STEM = """abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science
    college_mathematics college_physics computer_security conceptual_physics electrical_engineering
    elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science
    high_school_mathematics high_school_physics high_school_statistics machine_learning"""


FLEXIBLE, STRICT = "exact_match,flexible-extract", "exact_match,strict-match"
# The paper names no filter. strict-match asks for "####", which chat models leave out.
GSM8K = Benchmark(
    name="gsm8k",
    shots=5,
    metric=FLEXIBLE,
    other_metrics=(STRICT,),
    stock_files=("gsm8k/gsm8k.yaml",),
    dataset="gsm8k",
    max_new_tokens=512,
)
GSM_PLUS = replace(GSM8K, name="gsm-plus", stock_files=("gsm_plus/gsm_plus.yaml",), dataset="gsm_plus")
# The paper's teacher scores hardly above its student. Bare-answer shots and string comparison explain that.
MATH = Benchmark(
    name="math",
    shots=4,
    metric="exact_match,none",
    other_metrics=("math_verify,none",),
    stock_files=("hendrycks_math/hendrycks_math_*.yaml",),
    dataset="math",
    question="problem",
    max_new_tokens=1024,
    overrides={
        "doc_to_target": "answer",  # the stock template parses "[-9,9]" as a list, and lm-eval crashes
        "process_results": FunctionName("tsdkd.stages.eval.scorers.score_hendrycks_math"),
        "metric_list": mean_metrics("exact_match", "math_verify"),
    },
)
# mbpp_instruct without lm-eval's file, which scores chat models 0: its extractor drops the code's `def`. At import it
# also loads a metric from the hub.
MBPP = Benchmark(
    name="mbpp",
    shots=0,
    metric="pass_at_1,extract_code",
    dataset="mbpp",
    question="text",
    max_new_tokens=512,
    runs_code=True,
    overrides={
        "dataset_path": "google-research-datasets/mbpp",
        "dataset_name": "full",
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "You are an expert Python programmer, and here is your task:\n{{text}}\n"
        "Your code should pass these tests:\n{{test_list[0]}}\n{{test_list[1]}}\n{{test_list[2]}}",
        "doc_to_target": "{{code}}",
        "gen_prefix": "\n```python\n",
        "target_delimiter": "",
        "generation_kwargs": {"until": ["\n```\n"], "do_sample": False},
        "process_results": FunctionName("tsdkd.stages.eval.scorers.score_mbpp"),
        "metric_list": mean_metrics("pass_at_1"),
        "filter_list": extraction("extract_code", "tsdkd.stages.eval.scorers.extract_code_blocks"),
    },
)
# lm-eval's README names the chain-of-thought tasks "bbh".
BBH = Benchmark(
    name="bbh",
    shots=3,
    metric="exact_match,get-answer",
    stock_files=("bbh/cot_fewshot/[!_]*.yaml",),
    dataset="bbh",
    question="input",
    max_new_tokens=1024,
)
# The paper's 85.9 and 53.1 fit the accuracy over instructions, not over prompts.
IFEVAL = Benchmark(
    name="ifeval",
    shots=0,
    metric="inst_level_strict_acc,none",
    other_metrics=("prompt_level_strict_acc,none", "inst_level_loose_acc,none", "prompt_level_loose_acc,none"),
    stock_files=("ifeval/ifeval.yaml",),
    dataset="ifeval",
    split="train",
    question="prompt",
    max_new_tokens=1280,
)

BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        GSM8K,
        replace(GSM8K, name="gsm8k:strict", metric=STRICT, other_metrics=(FLEXIBLE,)),
        GSM_PLUS,
        # 2,400 of the 10,552 rows, which the authors of the data set chose.
        replace(
            GSM_PLUS,
            name="gsm-plus:mini",
            stock_files=("gsm_plus/gsm_plus_mini.yaml",),
            split="testmini",
        ),
        MATH,
        # The shots show reasoning; math_verify compares the answer.
        replace(
            MATH,
            name="math:minerva",
            metric="math_verify,none",
            other_metrics=("exact_match,none",),
            stock_files=("minerva_math/minerva_math_*.yaml",),
            overrides={},
        ),
        Benchmark(
            name="mmlu-pro-math",
            shots=5,
            metric="exact_match,custom-extract",
            stock_files=("mmlu_pro/mmlu_pro_math.yaml",),
            dataset="mmlu_pro",
            max_new_tokens=2048,
        ),
        Benchmark(
            name="mmlu-stem",
            shots=5,
            metric="acc,none",
            stock_files=tuple(f"mmlu/default/mmlu_{subject}.yaml" for subject in STEM.split()),
            dataset="mmlu",
        ),
        # The paper names no metric; acc is the first of lm-eval's.
        Benchmark(
            name="sciq",
            shots=0,
            metric="acc,none",
            other_metrics=("acc_norm,none",),
            stock_files=("sciq/sciq.yaml",),
            dataset="sciq",
            # lm-eval loads these splits for shots, and the benchmark has none
            overrides={"training_split": None, "validation_split": None},
        ),
        MBPP,
        # Three shots between [BEGIN] and [DONE], for base models.
        replace(
            MBPP,
            name="mbpp:base",
            shots=3,
            overrides=MBPP.overrides
            | {
                "doc_to_text": "You are an expert Python programmer, and here is your task: {{text}} "
                "Your code should pass these tests:\n\n{{test_list[0]}}\n{{test_list[1]}}\n{{test_list[2]}}\n[BEGIN]\n",
                "doc_to_target": "{{code}}\n[DONE]",
                "gen_prefix": None,
                "fewshot_split": "prompt",
                "fewshot_config": {"sampler": "first_n"},
                "generation_kwargs": {"until": ["[DONE]"], "do_sample": False},
            },
            chat_stops=("[DONE]",),  # the program ends there; the score reads all of the response
        ),
        BBH,
        # The shots show no reasoning.
        replace(
            BBH,
            name="bbh:direct",
            metric="exact_match,none",
            stock_files=("bbh/fewshot/[!_]*.yaml",),
            max_new_tokens=256,
            chat_stops=("\n\n",),  # the score compares all of the response: an explanation may follow the answer
        ),
        # 24 of the 27 tasks, as multiple choice.
        replace(
            BBH,
            name="bbh:choice",
            metric="acc_norm,none",
            stock_files=("leaderboard/bbh_mc/[!_]*.yaml",),
            max_new_tokens=None,
        ),
        Benchmark(
            name="musr",
            shots=0,
            metric="acc_norm,none",
            stock_files=("leaderboard/musr/musr_*.yaml",),
            dataset="musr",
            split="murder_mysteries, object_placements, team_allocation",
            question="narrative",
        ),
        IFEVAL,
        # The fraction of prompts with all instructions followed.
        replace(
            IFEVAL,
            name="ifeval:prompt",
            metric="prompt_level_strict_acc,none",
            other_metrics=("inst_level_strict_acc,none", "inst_level_loose_acc,none", "prompt_level_loose_acc,none"),
        ),
        # Included in tsdkd: two-person stories for the embedded pair.
        Benchmark(
            name="embedded",
            shots=0,
            metric="acc,none",
            split="benchmark",
            overrides={
                "include": str(EMBEDDED_DATA / "benchmark.yaml"),
                "dataset_kwargs": {"data_files": {"benchmark": str(EMBEDDED_DATA / "benchmark.parquet")}},
            },
        ),
    )
}
PAPER_BENCHMARKS = tuple(name for name in BENCHMARKS if ":" not in name and name != "embedded")
"""The ten benchmarks of the paper."""
BENCHMARKS |= {benchmark.name: benchmark for benchmark in REASONING_BENCHMARKS}
SUITES = {"all": PAPER_BENCHMARKS, "reasoning": tuple(benchmark.name for benchmark in REASONING_BENCHMARKS)}
"""Names that stand for several benchmarks."""


def choose_benchmarks(names: Iterable[str]) -> list[Benchmark]:
    """Benchmarks by name, in the order of `BENCHMARKS`. A suite adds each of its benchmarks unless a variant is named.

    Raises InputError that lists the known names.
    """
    normalized = [name.strip().lower().replace("_", "-") for name in names]
    for name in normalized:
        if name not in BENCHMARKS and name not in SUITES:
            raise InputError(f"{name!r} is not a benchmark.", f"Choose from: {', '.join([*SUITES, *BENCHMARKS])}.")
    bases = {BENCHMARKS[name].base for name in normalized if name in BENCHMARKS}
    added = {member for name in normalized for member in SUITES.get(name, ()) if member not in bases}
    return [benchmark for name, benchmark in BENCHMARKS.items() if name in {*normalized, *added}]
