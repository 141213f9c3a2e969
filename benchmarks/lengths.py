"""Measures how many tokens a model reads for one document of each benchmark.

    python benchmarks/lengths.py DATA MODEL

The results are the table in `tsdkd/stages/plan/benchmark_lengths.py`. DATA is the directory for `tsdkd eval --data`.
The tokenizer and chat template of MODEL read the first `DOCUMENTS` documents of each task; no model runs.
"""

import sys
from pathlib import Path
from statistics import mean
from typing import Any

from tsdkd.errors import InputError
from tsdkd.stages.eval import harness
from tsdkd.stages.models.tokenizers import load_tokenizer
from tsdkd.stages.results.benchmarks import BENCHMARKS

DOCUMENTS = 40


def main() -> None:
    tokenizer = load_tokenizer(sys.argv[2])

    def template(messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        continued = not add_generation_prompt  # the prompt ends with the beginning of the response, as in HFLM
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, continue_final_message=continued
        )
        return text

    def measure(task: Any) -> tuple[int, float]:
        """Documents, and tokens per document; HFLM reads a prompt once for all its choices of one token."""
        task.build_all_requests(
            limit=DOCUMENTS, apply_chat_template=True, fewshot_as_multiturn=True, chat_template=template
        )
        tokens, counted = 0, set()
        for request in task.instances:
            prompt, choice = request.args[0], request.args[1] if request.request_type == "loglikelihood" else ""
            if choice and len(tokenizer(choice, add_special_tokens=False).input_ids) == 1:
                if (request.doc_id, prompt) in counted:
                    continue
                counted.add((request.doc_id, prompt))
            tokens += len(tokenizer(prompt + choice, add_special_tokens=False).input_ids)
        documents = len(task.eval_docs)
        return documents, tokens / min(DOCUMENTS, documents)

    for name, benchmark in BENCHMARKS.items():
        try:
            lengths = [measure(task) for task in harness.load_tasks(benchmark, Path(sys.argv[1]), None).values()]
        except InputError as error:
            print(f"{name:16} {error.cause[:90]}", flush=True)
            continue
        documents = sum(count for count, _ in lengths)
        pooled = sum(count * tokens for count, tokens in lengths) / documents
        per_task = mean(tokens for _, tokens in lengths)  # for MuSR, when the data holds few rows of two tasks
        print(f"{name:16} documents {documents:6,}  tokens {pooled:7,.0f}  mean of tasks {per_task:7,.0f}", flush=True)


if __name__ == "__main__":
    main()
