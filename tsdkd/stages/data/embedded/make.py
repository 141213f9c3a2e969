"""Makes the embedded data: two-person stories with a question about one of the two.

    python -m tsdkd.stages.data.embedded.make

Short enough for a 135M-parameter teacher, which is right three times in four; a student with a few layers removed loses
track of who did what. Training prompts, held-out prompts and benchmark share the six kinds of story, and no story.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).parent
SEED = 0
SIZES = {"prompts": 384, "held_out": 64, "benchmark": 360}

NAMES = [
    "Tom",
    "Anna",
    "Ben",
    "Lucy",
    "Sam",
    "Mia",
    "Jack",
    "Emma",
    "Leo",
    "Nina",
    "Max",
    "Sara",
    "Paul",
    "Kate",
    "Adam",
    "Ruby",
    "Dan",
    "Ella",
    "Noah",
    "Lily",
]
THINGS = ["key", "coin", "cup", "ring", "ball", "hat", "book", "spoon", "lamp", "toy", "phone"]


class Kind(NamedTuple):
    name: str
    fact: str
    question: str
    beginning: str
    """Of the answer."""
    values: str


KINDS = (
    Kind(
        "job",
        "{name} is a {value}.",
        "What is the job of {name}?",
        "{name} is a",
        "doctor teacher farmer pilot nurse baker lawyer singer painter driver",
    ),
    Kind(
        "place",
        "{name} put the {thing} in the {value}.",
        "Where is the {thing}?",
        "The {thing} is in the",
        "drawer kitchen car garage basket fridge bedroom box garden bag",
    ),
    Kind(
        "home",
        "{name} lives in {value}.",
        "Where does {name} live?",
        "{name} lives in",
        "France Japan Brazil Egypt Canada India Spain China Italy Germany",
    ),
    Kind(
        "hat",
        "{name} wears a {value} hat.",
        "What color is the hat of {name}?",
        "{name} wears a",
        "red blue green yellow white black brown",
    ),
    Kind(
        "trip",
        "{name} went to the {value}.",
        "Where did {name} go?",
        "{name} went to the",
        "library park school shop beach zoo bank museum station hospital",
    ),
    Kind(
        "purchase",
        "{name} bought a {value}.",
        "What did {name} buy?",
        "{name} bought a",
        "lamp book hat phone ball ring cup toy chair bike",
    ),
)


def stories(seed: int) -> Iterator[dict[str, object]]:
    """Distinct stories without end, the kinds in turn."""
    draw = random.Random(seed)
    seen = set()
    while True:
        for kind in KINDS:
            people, things, chosen = draw.sample(NAMES, 2), draw.sample(THINGS, 2), draw.sample(kind.values.split(), 2)
            facts = [kind.fact.format(name=n, thing=t, value=v) for n, t, v in zip(people, things, chosen, strict=True)]
            asked = draw.randrange(2)
            who = {"name": people[asked], "thing": things[asked]}
            prompt = " ".join([*facts, kind.question.format(**who)])
            if prompt not in seen:
                seen.add(prompt)
                answer = {"answer": chosen[asked], "choices": sorted(chosen), "beginning": kind.beginning.format(**who)}
                yield {"kind": kind.name, "prompt": prompt, **answer}


def main() -> None:
    source = stories(SEED)
    parts = {name: [next(source) for _ in range(size)] for name, size in SIZES.items()}
    for name in ("prompts", "held_out"):
        lines = [json.dumps({"prompt": story["prompt"], "source": story["kind"]}) for story in parts[name]]
        (HERE / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    pq.write_table(pa.Table.from_pylist(parts["benchmark"]), HERE / "benchmark.parquet", compression="zstd")


if __name__ == "__main__":
    main()
