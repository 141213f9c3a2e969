"""What a measurement needs before its first response: data, a hub token, a sandbox, an engine, options that fit."""

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from tsdkd.artifacts.regular_files import require_regular_files
from tsdkd.errors import InputError
from tsdkd.stages.config.eval import EvalConfig
from tsdkd.stages.eval.sandbox.verdict import check_confinement
from tsdkd.stages.models.spec import ModelSpec
from tsdkd.stages.parallel.choice import require_parallel
from tsdkd.stages.results.benchmark import Benchmark


def require_prerequisites(benchmarks: list[Benchmark], data: Path | None, allow_code: bool) -> None:
    """Raise one InputError for all missing prerequisites, before the first response."""
    missing = [error for benchmark in benchmarks for error in _missing_prerequisites(benchmark, data, allow_code)]
    if missing:
        raise InputError(" ".join(error.cause for error in missing), " ".join(error.remedy for error in missing))


def _missing_prerequisites(benchmark: Benchmark, data: Path | None, allow_code: bool) -> Iterator[InputError]:
    dataset = benchmark.local_dataset(data)
    checks: list[Callable[[], None]] = []
    if dataset:
        checks.append(partial(_require_dataset, benchmark.name, dataset))
    elif benchmark.gated:
        checks.append(partial(_require_token, benchmark))
    if benchmark.runs_code:
        checks.append(partial(_require_sandbox, benchmark.name, allow_code))
    if benchmark.base == "ifeval":
        checks.append(partial(_require_sentence_splitter, benchmark.name))
    for check in checks:
        try:
            check()
        except InputError as error:
            yield error


def _require_dataset(name: str, dataset: Path) -> None:
    if not dataset.is_dir():
        raise InputError(
            f"{name} needs the directory {dataset}.",
            "Put a copy of the dataset's repository there, or leave out --data to use the hub.",
        )
    require_regular_files(dataset)


def _require_token(benchmark: Benchmark) -> None:
    from huggingface_hub import get_token
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if not HF_HUB_OFFLINE and get_token() is None:
        raise InputError(
            f"{benchmark.name} needs the gated dataset {benchmark.gated}, and there is no hub token.",
            gated_remedy(benchmark),
        )


def gated_remedy(benchmark: Benchmark) -> str:
    """How a user gets the dataset of a gated benchmark."""
    return (
        f"Accept the terms at https://huggingface.co/datasets/{benchmark.gated} and run `hf auth login`, "
        f"or name the directory that holds a local copy as {benchmark.dataset}/ with --data."
    )


def _require_sandbox(name: str, allowed: bool) -> None:
    if not allowed:
        raise InputError(
            f"{name} runs programs that the model wrote.",
            "Give --allow-code-execution (programs run in a sandbox; see docs/evaluation.md), "
            "or leave it out of --tasks.",
        )
    failure = check_confinement()
    if failure:
        raise InputError(
            f"{name} runs programs that the model wrote, and this machine cannot confine them ({failure}).",
            "Run on Linux with libseccomp, or leave it out of --tasks.",
        )


def _require_sentence_splitter(name: str) -> None:
    """lm-eval would download the data at import; without a network it would fail after all responses."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab/english/")
    except LookupError:
        raise InputError(
            f"{name} splits sentences with nltk's punkt_tab, which is not installed.",
            "Run `python -m nltk.downloader punkt_tab`, or copy it to $NLTK_DATA/tokenizers/punkt_tab.",
        ) from None


def require_engine(config: EvalConfig, held_out: Path | None) -> None:
    """Raises InputError for an engine that is missing or does not fit the other options."""
    if config.engine == "vllm" and config.attention and held_out is None:
        raise InputError("--attention works with transformers only.", "Leave out --attention, or --engine vllm.")
    if config.engine == "vllm" and find_spec("vllm") is None:
        raise InputError("vLLM is not installed.", "Run `pip install 'tsdkd[vllm]'`, or use --engine transformers.")
    require_parallel("eval", config)


def require_sampling(config: EvalConfig, benchmarks: list[Benchmark]) -> None:
    """Raises InputError for sampling options that a benchmark cannot follow."""
    without_effect = {"temperature": 0, "top_p": 1, "samples": 1}
    given = " and ".join(
        f"--{name.replace('_', '-')} {value}"
        for name, default in without_effect.items()
        if (value := getattr(config, name)) not in (None, default)
    )
    choices = [benchmark.name for benchmark in benchmarks if not benchmark.max_new_tokens]
    if given and choices:
        raise InputError(
            f"Multiple choice samples no responses ({', '.join(choices)}), but {given} is given.",
            "Leave it out, or measure multiple choice with another command.",
        )
    greedy = [benchmark.name for benchmark in benchmarks if not benchmark.choose_sampling(config).temperature]
    if given and greedy:
        raise InputError(
            f"Greedy responses to a prompt are all alike ({', '.join(greedy)}), but {given} is given.",
            "Give a --temperature above 0 too, such as 0.6.",
        )


def require_space_for_prompts(benchmarks: list[Benchmark], config: EvalConfig, context: int) -> None:
    """Raises InputError for a response limit that leaves no space for a prompt."""
    for benchmark in benchmarks:
        limit = benchmark.response_limit(config.max_new_tokens)
        if limit >= context:
            raise InputError(
                f"{benchmark.name} generates up to {limit:,} tokens, but the context has {context:,}, prompt included.",
                "Give a smaller --max-new-tokens, or leave the benchmark out.",
            )


def require_end_token(model: ModelSpec, benchmarks: list[Benchmark]) -> None:
    """Raises InputError for a model whose responses would not end."""
    generating = [benchmark.name for benchmark in benchmarks if benchmark.max_new_tokens]
    if generating and not model.end_ids:
        raise InputError(
            f"{model.name} has no end token, so its responses to {', '.join(generating)} would not end.",
            "Set eos_token_id in its generation_config.json, or choose other benchmarks.",
        )
