"""The reasoning suite: competition mathematics and graduate-level questions, with sampled responses."""

from dataclasses import replace
from typing import Any

from tsdkd.stages.results.benchmark import Benchmark, FunctionName, Sampling, extraction, mean_metrics

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
MAX_NEW_TOKENS = 32_768
"""lm-eval's limit for AIME, and the usual one in papers on reasoning models."""
SAMPLING = Sampling(temperature=0.6, top_p=0.95, samples=16)
"""The temperature and top-p of DeepSeek-R1 and Qwen3. They take 64 samples of a document of AIME."""
ANSWERS = "tsdkd.stages.eval.answers"


def _overrides(prompt: str, metric: str, extractor: str) -> dict[str, Any]:
    return {
        "doc_to_text": prompt,
        # The end of the turn ends a response. lm-eval's "Question:" would cut one that restates its prompt.
        "generation_kwargs": {"until": [], "do_sample": False},
        "metric_list": mean_metrics(metric),
        "filter_list": extraction("boxed" if metric == "math_verify" else "choice", f"{ANSWERS}.{extractor}"),
    }


def _mathematics(column: str) -> dict[str, Any]:
    """`column`: that of a problem."""
    prompt = f"{{{{{column}}}}}\n\n{INSTRUCTION}"
    return _overrides(prompt, "math_verify", "extract_boxed_answers") | {
        "process_results": FunctionName(f"{ANSWERS}.score_mathematics"),
    }


AIME24 = Benchmark(
    name="aime24",
    shots=0,
    metric="math_verify,boxed",
    stock_files=("aime/aime24.yaml",),
    dataset="aime24",
    split="train",
    question="Problem",
    max_new_tokens=MAX_NEW_TOKENS,
    sampling=SAMPLING,
    whole_prompts=True,
    overrides=_mathematics("Problem"),
)
REASONING_BENCHMARKS = (
    AIME24,
    replace(
        AIME24,
        name="aime25",
        stock_files=("aime/aime25.yaml",),
        dataset="aime25",
        split="test",
        question="problem",
        overrides=_mathematics("problem"),
    ),
    # lm-eval has no task for the 40 problems of AMC 12 2023.
    replace(
        AIME24,
        name="amc23",
        stock_files=(),
        dataset="amc23",
        split="test",
        question="question",
        overrides={
            "dataset_path": "math-ai/amc23",
            "output_type": "generate_until",
            "test_split": "test",
            "doc_to_target": "{{answer}}",
            **_mathematics("question"),
        },
    ),
    # hendrycks_math500 and minerva_math500 load the same rows; the latter adds four shots.
    replace(
        AIME24,
        name="math-500",
        stock_files=("hendrycks_math/hendrycks_math500.yaml",),
        dataset="math500",
        split="test",
        question="problem",
        sampling=replace(SAMPLING, samples=4),
        overrides=_mathematics("problem"),
    ),
    # Of lm-eval's tasks, the one with reasoning and without shots. It shuffles the choices without a seed.
    replace(
        AIME24,
        name="gpqa-diamond",
        metric="exact_match,choice",
        stock_files=("gpqa/cot_zeroshot/gpqa_diamond_cot_zeroshot.yaml",),
        dataset="gpqa",
        split="train",
        question="Question",
        sampling=replace(SAMPLING, samples=4),
        gated="Idavidrein/gpqa",
        overrides={
            "process_docs": FunctionName(f"{ANSWERS}.shuffle_choices"),
            **_overrides(
                "What is the correct answer to this question: {{Question}}\nChoices:\n(A) {{choice1}}\n"
                "(B) {{choice2}}\n(C) {{choice3}}\n(D) {{choice4}}\n\n"
                "Please reason step by step, and put the letter of your choice within \\boxed{}.",
                "exact_match",
                "extract_choices",
            ),
        },
    ),
)
