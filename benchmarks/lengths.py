"""Tokens that a model reads for one document of each benchmark: the table in `stages/plan/benchmark_lengths.py`.

    python benchmarks/lengths.py DATA MODEL

DATA is as `tsdkd eval --data` takes it; MODEL's tokenizer counts, through its chat template, the first `READ` documents
of each subject. Nothing is answered.
"""

import sys
from pathlib import Path
from statistics import mean
from typing import Any

from tsdkd.errors import InputError
from tsdkd.stages.eval import harness
from tsdkd.stages.models.tokenizers import load_tokenizer
from tsdkd.stages.results.benchmarks import BENCHMARKS

READ = 40


def main() -> None:
    tokenizer = load_tokenizer(sys.argv[2])

    def template(messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        continued = not add_generation_prompt  # the answer's beginning is given, as HFLM has it
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, continue_final_message=continued
        )
        return text

    def read(task: Any) -> tuple[int, float]:
        """Documents, and tokens read for one; choices of one token are read together, as `HFLM` does."""
        task.build_all_requests(limit=READ, apply_chat_template=True, fewshot_as_multiturn=True, chat_template=template)
        tokens, together = 0, set()
        for request in task.instances:
            prompt, answer = request.args[0], request.args[1] if request.request_type == "loglikelihood" else ""
            whole = len(tokenizer(prompt + answer, add_special_tokens=False).input_ids)
            if answer and len(tokenizer(answer, add_special_tokens=False).input_ids) == 1:
                if (request.doc_id, prompt) in together:
                    continue
                together.add((request.doc_id, prompt))
            tokens += whole
        documents = len(task.eval_docs)
        return documents, tokens / min(READ, documents)

    for name, benchmark in BENCHMARKS.items():
        try:
            found = [read(task) for task in harness.load_tasks(benchmark, Path(sys.argv[1]), None).values()]
        except InputError as error:
            print(f"{name:16} {error.cause[:90]}", flush=True)
            continue
        documents = sum(count for count, _ in found)
        pooled = sum(count * tokens for count, tokens in found) / documents
        even = mean(tokens for _, tokens in found)  # for MuSR, of which two subjects are mostly missing
        print(f"{name:16} documents {documents:6,}  tokens {pooled:7,.0f}  subjects alike {even:7,.0f}", flush=True)


if __name__ == "__main__":
    main()
