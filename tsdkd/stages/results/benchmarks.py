"""The benchmarks by name: which lm-eval tasks stand for each, with the paper's shots and the metric that is reported.

Loads without lm-eval and torch. A task reaches lm-eval as an overlay: a YAML file that includes the stock task and
changes what stands in the table, and, for local data, where the rows are.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from tsdkd.errors import InputError

EMBEDDED_DATA = Path(__file__).parents[1] / "data" / "embedded"
STEM = """abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science
    college_mathematics college_physics computer_security conceptual_physics electrical_engineering
    elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science
    high_school_mathematics high_school_physics high_school_statistics machine_learning"""


class Function(str):
    """A Python function that lm-eval imports by name."""

    __slots__ = ()


class Dumper(yaml.SafeDumper):
    """YAML as lm-eval reads it."""


Dumper.add_representer(Function, lambda dumper, name: dumper.represent_scalar("!function", str(name)))


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One row of the table. A variant of a benchmark is called NAME:VARIANT."""

    name: str
    reason: str
    """Why this task and this metric, where the paper leaves room."""
    shots: int
    metric: str
    """Headline "metric,filter" key."""
    others: tuple[str, ...] = ()
    """Keys reported beside it."""
    stock: tuple[str, ...] = ()
    """The stock files, as patterns below lm_eval/tasks; none where `settings` say everything."""
    folder: str = ""
    """Below --data: a copy of the dataset's repository on the hub. Empty where rows only come along."""
    split: str = "test"
    """What is measured."""
    max_new_tokens: int | None = None
    """Where an answer is cut; None where answers are not generated."""
    runs_code: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    """What the overlay changes."""

    def overlays(self, rows: Path | None = None, cache: Path | None = None) -> dict[str, str]:
        """The YAML files that lm-eval loads, by task. `rows`: a local copy and its `cache`; None is the hub."""
        content = {"num_fewshot": self.shots, **self.settings}
        if rows is not None:
            content |= {"dataset_path": str(rows.resolve()), "dataset_kwargs": {"cache_dir": str(cache)}}
        if not self.stock:
            return {self.key: _dumped({"task": self.key, **content})}
        files = sorted(file for pattern in self.stock for file in _lm_eval_tasks().glob(pattern))
        return {file.stem: _dumped({"include": str(file), "task": file.stem, **content}) for file in files}

    def rows(self, data: Path | None) -> Path | None:
        """The local copy below --data; None where the rows come from the hub, or come along."""
        return data / self.folder if data is not None and self.folder else None

    @property
    def key(self) -> str:
        """The name as a file name."""
        return self.name.replace(":", "-")

    @property
    def base(self) -> str:
        return self.name.partition(":")[0]


def _lm_eval_tasks() -> Path:
    spec = find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise InputError("lm-eval is not installed.", "Run `pip install 'lm-eval[hf,ifeval,math]==0.4.13'`.")
    return Path(spec.origin).parent / "tasks"


def _dumped(content: dict[str, Any]) -> str:
    return yaml.dump(content, Dumper=Dumper)


FLEXIBLE, STRICT = "exact_match,flexible-extract", "exact_match,strict-match"
GSM8K = Benchmark(
    name="gsm8k",
    reason="the paper does not name the filter; flexible-extract does not punish answers without '####'",
    shots=5,
    metric=FLEXIBLE,
    others=(STRICT,),
    stock=("gsm8k/gsm8k.yaml",),
    folder="gsm8k",
    max_new_tokens=512,
)
GSM_PLUS = replace(GSM8K, name="gsm-plus", stock=("gsm_plus/gsm_plus.yaml",), folder="gsm_plus")
MATH = Benchmark(
    name="math",
    reason="the paper's teacher is hardly above its student: bare-answer shots and string comparison do that",
    shots=4,
    metric="exact_match,none",
    others=("math_verify,none",),
    stock=("hendrycks_math/hendrycks_math_*.yaml",),
    folder="math",
    max_new_tokens=1024,
    settings={
        "doc_to_target": "answer",  # the stock template reads "[-9,9]" as a list and crashes
        "process_results": Function("tsdkd.stages.eval.scorers.hendrycks_math"),
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in ("exact_match", "math_verify")
        ],
    },
)
# Stand-alone: the stock file loads a metric from the hub when it is imported, and its extractor eats the code's `def`.
MBPP = Benchmark(
    name="mbpp",
    reason="stock mbpp and mbpp_instruct score chat models 0; this is mbpp_instruct with a working extractor",
    shots=0,
    metric="pass_at_1,extract_code",
    folder="mbpp",
    max_new_tokens=512,
    runs_code=True,
    settings={
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
        "process_results": Function("tsdkd.stages.eval.scorers.mbpp"),
        "metric_list": [{"metric": "pass_at_1", "aggregation": "mean", "higher_is_better": True}],
        "filter_list": [
            {
                "name": "extract_code",
                "filter": [
                    {"function": "custom", "filter_fn": Function("tsdkd.stages.eval.scorers.code_blocks")},
                    {"function": "take_first"},
                ],
            }
        ],
    },
)
BBH = Benchmark(
    name="bbh",
    reason="'bbh' is the chain-of-thought group in lm-eval",
    shots=3,
    metric="exact_match,get-answer",
    stock=("bbh/cot_fewshot/[!_]*.yaml",),
    folder="bbh",
    max_new_tokens=1024,
)
IFEVAL = Benchmark(
    name="ifeval",
    reason="the paper's 85.9 and 53.1 fit the share of instructions, not of prompts",
    shots=0,
    metric="inst_level_strict_acc,none",
    others=("prompt_level_strict_acc,none", "inst_level_loose_acc,none", "prompt_level_loose_acc,none"),
    stock=("ifeval/ifeval.yaml",),
    folder="ifeval",
    split="train",
    max_new_tokens=1280,
)

BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        GSM8K,
        replace(GSM8K, name="gsm8k:strict", reason="the other filter", metric=STRICT, others=(FLEXIBLE,)),
        GSM_PLUS,
        replace(
            GSM_PLUS,
            name="gsm-plus:mini",
            reason="2,400 of the 10,552 rows, chosen by its authors",
            stock=("gsm_plus/gsm_plus_mini.yaml",),
            split="testmini",
        ),
        MATH,
        replace(
            MATH,
            name="math:minerva",
            reason="shots that reason; the answer is compared as mathematics",
            metric="math_verify,none",
            others=("exact_match,none",),
            stock=("minerva_math/minerva_math_*.yaml",),
            settings={},
        ),
        Benchmark(
            name="mmlu-pro-math",
            reason="lm-eval's task of that name",
            shots=5,
            metric="exact_match,custom-extract",
            stock=("mmlu_pro/mmlu_pro_math.yaml",),
            folder="mmlu_pro",
            max_new_tokens=2048,
        ),
        Benchmark(
            name="mmlu-stem",
            reason="lm-eval's group of that name",
            shots=5,
            metric="acc,none",
            stock=tuple(f"mmlu/default/mmlu_{subject}.yaml" for subject in STEM.split()),
            folder="mmlu",
        ),
        Benchmark(
            name="sciq",
            reason="the paper does not say whether lengths are normalised; acc is lm-eval's first",
            shots=0,
            metric="acc,none",
            others=("acc_norm,none",),
            stock=("sciq/sciq.yaml",),
            folder="sciq",
            settings={"training_split": None, "validation_split": None},  # loaded for shots that are not used
        ),
        MBPP,
        replace(
            MBPP,
            name="mbpp:base",
            reason="three shots between [BEGIN] and [DONE], for base models",
            shots=3,
            settings=MBPP.settings
            | {
                "doc_to_text": "You are an expert Python programmer, and here is your task: {{text}} "
                "Your code should pass these tests:\n\n{{test_list[0]}}\n{{test_list[1]}}\n{{test_list[2]}}\n[BEGIN]\n",
                "doc_to_target": "{{code}}\n[DONE]",
                "gen_prefix": None,
                "fewshot_split": "prompt",
                "fewshot_config": {"sampler": "first_n"},
                "generation_kwargs": {"until": ["[DONE]"], "do_sample": False},
            },
        ),
        BBH,
        replace(
            BBH,
            name="bbh:direct",
            reason="answers without reasoning",
            metric="exact_match,none",
            stock=("bbh/fewshot/[!_]*.yaml",),
            max_new_tokens=256,
        ),
        replace(
            BBH,
            name="bbh:choice",
            reason="24 of the 27 tasks, as multiple choice",
            metric="acc_norm,none",
            stock=("leaderboard/bbh_mc/[!_]*.yaml",),
            max_new_tokens=None,
        ),
        Benchmark(
            name="musr",
            reason="lm-eval's only MuSR",
            shots=0,
            metric="acc_norm,none",
            stock=("leaderboard/musr/musr_*.yaml",),
            folder="musr",
            split="murder_mysteries, object_placements, team_allocation",
        ),
        IFEVAL,
        replace(
            IFEVAL,
            name="ifeval:prompt",
            reason="the share of prompts of which every instruction was followed",
            metric="prompt_level_strict_acc,none",
            others=("inst_level_strict_acc,none", "inst_level_loose_acc,none", "prompt_level_loose_acc,none"),
        ),
        Benchmark(
            name="embedded",
            reason="comes along: two-person stories for the embedded pair",
            shots=0,
            metric="acc,none",
            split="benchmark",
            settings={
                "include": str(EMBEDDED_DATA / "benchmark.yaml"),
                "dataset_kwargs": {"data_files": {"benchmark": str(EMBEDDED_DATA / "benchmark.parquet")}},
            },
        ),
    )
}
PAPER_BENCHMARKS = tuple(name for name in BENCHMARKS if ":" not in name and name != "embedded")
"""The paper's ten."""


def choose_benchmarks(names: Iterable[str]) -> list[Benchmark]:
    """Benchmarks by name, in the table's order; "all" adds those of the paper's ten of which no variant is named.

    Raises InputError listing those known.
    """
    known = [name.strip().lower().replace("_", "-") for name in names]
    for name in known:
        if name not in BENCHMARKS and name != "all":
            raise InputError(f"There is no benchmark {name!r}.", f"Choose from: all, {', '.join(BENCHMARKS)}.")
    bases = {BENCHMARKS[name].base for name in known if name != "all"}
    ten = [name for name in PAPER_BENCHMARKS if name not in bases] if "all" in known else []
    return [benchmark for name, benchmark in BENCHMARKS.items() if name in {*known, *ten}]
