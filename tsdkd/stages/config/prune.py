"""Configuration of `tsdkd prune`."""

from dataclasses import dataclass

from tsdkd.stages.config.groups import DATA, ENGINE, PRUNING
from tsdkd.stages.config.option import option
from tsdkd.stages.config.types import DTYPE_HELP, DType, attention_option


@dataclass(frozen=True)
class PruneConfig:
    """How many layers are removed, and how they are chosen."""

    drop: int = option(1, "Layers to remove.", group=PRUNING, min_=1, common=True)
    limit: int = option(8, "Prompts that decide which layers are removed.", group=PRUNING, min_=1, common=True)
    max_tokens: int = option(256, "Tokens of each prompt.", group=PRUNING, min_=1)
    column: str | None = option(None, "Column with messages or text.", group=DATA, shown="messages, else prompt")
    dtype: DType = option("auto", DTYPE_HELP, group=ENGINE)
    attention: str | None = attention_option()
