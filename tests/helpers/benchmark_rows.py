"""Synthetic datasets in the layout of the hub, for tests without real data: one of each output type."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def doubled(number: int) -> str:
    return f"What is {number} times 2?"


ROWS: dict[str, tuple[str, dict[str, list[dict[str, Any]]]]] = {
    "gsm8k": (
        "main",
        {
            "train": [{"question": f"What is {i} plus 1?", "answer": f"Add. #### {i + 1}"} for i in range(8)],
            "test": [{"question": f"What is {i} times 2?", "answer": f"Double. #### {2 * i}"} for i in range(6)],
        },
    ),
    "sciq": (
        "default",
        {
            "test": [
                {
                    "question": f"What has {i} legs?",
                    "support": "Legs are counted.",
                    "correct_answer": f"animal {i}",
                    "distractor1": "stone",
                    "distractor2": "cloud",
                    "distractor3": "river",
                }
                for i in range(6)
            ]
        },
    ),
    "mbpp": (
        "full",
        {
            "test": [
                {
                    "task_id": i,
                    "text": f"Write a function to add {i}.",
                    "code": f"def add(n):\n    return n + {i}",
                    "test_list": [f"assert add({k}) == {i + k}" for k in range(3)],
                    "test_setup_code": "",
                }
                for i in range(4)
            ]
        },
    ),
    "ifeval": (
        "default",
        {
            "train": [
                {
                    "key": 1,
                    "prompt": "Say yes, without commas, in at least two sentences.",
                    "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_sentences"],
                    "kwargs": [{"relation": None, "num_sentences": None}, {"relation": "at least", "num_sentences": 2}],
                },
                {
                    "key": 2,
                    "prompt": "Answer in lower case.",
                    "instruction_id_list": ["change_case:english_lowercase"],
                    "kwargs": [{"relation": None, "num_sentences": None}],
                },
            ]
        },
    ),
    "aime24": (
        "default",
        {
            "train": [
                {"ID": f"2024-I-{i}", "Problem": doubled(i), "Solution": "Double.", "Answer": 2 * i} for i in range(4)
            ]
        },
    ),
    "aime25": (
        "default",
        {"test": [{"problem": doubled(i), "answer": str(2 * i), "id": str(i)} for i in range(4)]},
    ),
    "amc23": (
        "default",
        {"test": [{"id": i, "question": doubled(i), "answer": str(2 * i), "url": "none"} for i in range(4)]},
    ),
    "math500": (
        "default",
        {
            "test": [
                {
                    "problem": doubled(i),
                    "solution": f"Double: $\\boxed{{{2 * i}}}$.",
                    "answer": str(2 * i),
                    "subject": "Algebra",
                    "level": 1,
                    "unique_id": f"test/algebra/{i}.json",
                }
                for i in range(4)
            ]
        },
    ),
    "gpqa": (
        "gpqa_diamond",
        {
            "train": [
                {
                    "Question": doubled(i),
                    "Correct Answer": f"{2 * i} ",
                    **{f"Incorrect Answer {k}": f"{2 * i + k} [title] at least" for k in (1, 2, 3)},
                }
                for i in range(4)
            ]
        },
    ),
}


def write_rows(directory: Path) -> Path:
    """Writes the datasets into `directory`, which fits --data."""
    for folder, (config, splits) in ROWS.items():
        (directory / folder).mkdir(parents=True)
        for split, rows in splits.items():
            pq.write_table(pa.Table.from_pylist(rows), directory / folder / f"{split}.parquet")
        files = [{"split": split, "path": f"{split}.parquet"} for split in splits]
        card = {"configs": [{"config_name": config, "data_files": files}]}
        (directory / folder / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    return directory
