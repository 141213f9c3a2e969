"""Writes the embedded data: stories of two people, each with a question about one of them.

    python -m tsdkd.stages.data.embedded.make

The embedded teacher of 135M parameters answers three of four correctly; a student without some of its layers confuses
the people. Training prompts, held-out prompts and benchmark share the six story kinds and no story.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

DIRECTORY = Path(__file__).parent
SEED = 0
SIZES = {"prompts": 384, "held_out": 64, "benchmark": 360}
SYSTEM_MESSAGE = "Answer briefly."
"""Also the description in benchmark.yaml."""

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


class StoryKind(NamedTuple):
    name: str
    fact: str
    question: str
    beginning: str
    """The words of the response before the answer."""
    values: str
    """Separated by spaces."""


STORY_KINDS = (
    StoryKind(
        "job",
        "{name} is a {value}.",
        "What is the job of {name}?",
        "{name} is a",
        "doctor teacher farmer pilot nurse baker lawyer singer painter driver",
    ),
    StoryKind(
        "place",
        "{name} put the {thing} in the {value}.",
        "Where is the {thing}?",
        "The {thing} is in the",
        "drawer kitchen car garage basket fridge bedroom box garden bag",
    ),
    StoryKind(
        "home",
        "{name} lives in {value}.",
        "Where does {name} live?",
        "{name} lives in",
        "France Japan Brazil Egypt Canada India Spain China Italy Germany",
    ),
    StoryKind(
        "hat",
        "{name} wears a {value} hat.",
        "What color is the hat of {name}?",
        "{name} wears a",
        "red blue green yellow white black brown",
    ),
    StoryKind(
        "trip",
        "{name} went to the {value}.",
        "Where did {name} go?",
        "{name} went to the",
        "library park school shop beach zoo bank museum station hospital",
    ),
    StoryKind(
        "purchase",
        "{name} bought a {value}.",
        "What did {name} buy?",
        "{name} bought a",
        "lamp book hat phone ball ring cup toy chair bike",
    ),
)


def stories(seed: int) -> Iterator[dict[str, object]]:
    """Endless distinct stories, one of each kind in turn."""
    generator = random.Random(seed)
    prompts = set()
    while True:
        for kind in STORY_KINDS:
            names, things = generator.sample(NAMES, 2), generator.sample(THINGS, 2)
            values = generator.sample(kind.values.split(), 2)
            facts = [kind.fact.format(name=n, thing=t, value=v) for n, t, v in zip(names, things, values, strict=True)]
            person = generator.randrange(2)
            words = {"name": names[person], "thing": things[person]}
            prompt = " ".join([*facts, kind.question.format(**words)])
            if prompt in prompts:
                continue
            prompts.add(prompt)
            yield {
                "kind": kind.name,
                "prompt": prompt,
                "answer": values[person],
                "choices": sorted(values),
                "beginning": kind.beginning.format(**words),
            }


def messages(story: dict[str, object]) -> list[dict[str, object]]:
    return [{"role": "system", "content": SYSTEM_MESSAGE}, {"role": "user", "content": story["prompt"]}]


def main() -> None:
    distinct = stories(SEED)
    files = {name: [next(distinct) for _ in range(size)] for name, size in SIZES.items()}
    for name in ("prompts", "held_out"):
        lines = [json.dumps({"messages": messages(story), "source": story["kind"]}) for story in files[name]]
        (DIRECTORY / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    pq.write_table(pa.Table.from_pylist(files["benchmark"]), DIRECTORY / "benchmark.parquet", compression="zstd")


if __name__ == "__main__":
    main()
