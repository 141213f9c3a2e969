"""The modules that campaigns load once, before they fork: loading them takes longer than a run."""

from importlib import import_module

from tsdkd.cli.app import COMMANDS

PRELOADED = (
    "torch",
    "transformers.trainer",
    "transformers.models.llama.modeling_llama",
    "peft",
    "datasets",
    "peft.utils.transformers_weight_conversion",
    "lm_eval.evaluator",
    "lm_eval.tasks",
    "pyarrow.parquet",
    "matplotlib.backends.backend_svg",
    *(f"tsdkd.cli.{name}" for name in COMMANDS),
    "tsdkd.stages.eval.harness",
    "tsdkd.stages.eval.lm_eval_transformers",
    "tsdkd.stages.eval.stage",
    "tsdkd.stages.engines.both_models",
    "tsdkd.stages.engines.transformers_engine",
    "tsdkd.stages.generate.stage",
    "tsdkd.stages.inspect.stage",
    "tsdkd.stages.prune",
    "tsdkd.stages.report.stage",
    "tsdkd.stages.score.stage",
    "tsdkd.stages.train.stage",
)


def preload() -> None:
    """Load what a run needs, so that it begins at once."""
    for module in PRELOADED:
        import_module(module)
    import_module("torch").set_num_threads(1)
