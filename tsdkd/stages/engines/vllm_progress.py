"""vLLM's progress, forwarded to a callback. Imports no vLLM."""

import io
from collections.abc import Callable
from typing import Any

from tqdm import tqdm


def forward_progress(advance: Callable[[int], None]) -> Callable[..., Any]:
    """The `use_tqdm` argument of `LLM.generate` that calls `advance` with the responses just completed."""

    class ForwardingBar(tqdm):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings | {"file": io.StringIO(), "disable": False})  # vLLM reads the bar's clock

        def update(self, n: float | None = 1) -> None:
            advance(int(n or 0))
            super().update(n)

    def make_bar(prompts: Any = None, **settings: Any) -> Any:
        """vLLM also wraps the prompts in a bar; only responses count."""
        return ForwardingBar(**settings) if prompts is None else prompts

    return make_bar
