"""Files of methods with losses of their own: the examples of the docs, and one with statistics of whole steps."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "write_a_method.md"

OF_WHOLE_STEPS = '''
import torch

from tsdkd.methods import Divergence, Entropy, Method, Weighted


def select(features, options):
    """Every kind of batch statistic: a quantile, ranks of all tokens, the extremes, the prompts, a state."""
    entropy, hellinger = features.student_entropy, features.hellinger
    high = entropy >= entropy[features.mask].quantile(0.4)
    first = features.batch_ranks(features.forward_kl + features.uniform) < 7
    scaled = hellinger / hellinger[features.mask].max()
    even = (features.prompts % 2 == 0).unsqueeze(-1)
    features.state["steps"] += 1
    return {
        "kl": Weighted(features.batch_mean(high & even), temperature=1 + scaled, factor=features.state["mean"]),
        "first": features.mean(first) * scaled,
        "entropy": features.batch_mean(first),
    }


def update(state, terms, options):
    state["mean"] += 0.5 * (terms["first"] - state["mean"])


METHOD = Method(
    name="of-whole-steps",
    full_name="a test",
    description="a divergence with statistics of the whole step",
    losses={"kl": Divergence.jsd(0), "first": Divergence.jsd(0.5), "entropy": Entropy()},
    select=select,
    update=update,
    features=("student_entropy", "hellinger", "forward_kl", "uniform"),
    scope="batch",
    state={"mean": 1.0, "steps": 0},
)
'''


def page_examples() -> list[str]:
    """The Python files of docs/write_a_method.md, word for word."""
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


def write_method(path: Path, text: str = OF_WHOLE_STEPS) -> Path:
    path.write_text(text)
    return path
