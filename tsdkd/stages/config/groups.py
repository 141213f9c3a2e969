"""Groups of options: the headings of help and of the reference."""

COMMON = "Common options"
"""The group of options with `common`, in place of their own."""
SAMPLING, BENCHMARKS, PRUNING, SCORING = "Sampling", "Benchmarks", "Pruning", "Scores"
DATA = "Inputs and outputs"
CHAT = "Chat format"
MODELS = "Models"
OBJECTIVE = "Objective (symbols of the paper; each method has some of them)"
OPTIMIZER = "Optimizer"
ONLINE = "Online training (with --prompts, --teacher or --lambda)"
REPLAY = "Replay (with --method distillm)"
LORA = "LoRA (with --lora)"
MONITORING = "Measurements, logs and saves"
RESPONSES = "Shown responses"
ENGINE = "Engine and precision"
VLLM = "vLLM"
COMPARISON = "Comparison"
GROUPS = (
    SAMPLING,
    SCORING,
    BENCHMARKS,
    PRUNING,
    RESPONSES,
    DATA,
    CHAT,
    MODELS,
    OBJECTIVE,
    OPTIMIZER,
    ONLINE,
    REPLAY,
    LORA,
    MONITORING,
    ENGINE,
    VLLM,
    COMPARISON,
)
"""Groups of options, in the order in which help shows them."""
