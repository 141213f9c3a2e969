"""Writes a document of each benchmark with all models' responses, as a page of Markdown:

python -m recipes.paper.figure8 OUTPUT RESULTS "BENCHMARK..." MODEL...
"""

import re
import sys
from collections.abc import Iterable, Mapping
from itertools import takewhile
from pathlib import Path

import pyarrow.compute as pc

from tsdkd.artifacts.disk import replace_text
from tsdkd.artifacts.locks import reading_inputs
from tsdkd.artifacts.reader import Artifact, read_artifact
from tsdkd.cli.console import show_error
from tsdkd.errors import InputError
from tsdkd.printable import escape_controls, escape_markdown
from tsdkd.stages.report.responses import Document, format_verdict, read_document
from tsdkd.stages.results.benchmarks import BENCHMARKS, choose_benchmarks
from tsdkd.stages.results.compare import document_scores

TEACHER, STUDENT, FAVOURED = "teacher", "student", "tsdkd"
INTRODUCTION = f"""# Figure 8: one document of each benchmark, with every model's response

**An example is no evidence.** For each benchmark, this page shows the first document that {FAVOURED} alone answers
correctly, whatever the {TEACHER} answers; if there is none, the first document. This rule favours {FAVOURED}. For every
model, the tables give the accuracy and the number of documents that it alone answers correctly. Tokens are counted by
the {STUDENT}'s tokenizer, without the end token.
"""


def figure_page(results: Mapping[str, Artifact], benchmarks: Iterable[str]) -> str:
    """The page; results by the model's name. Raises InputError for an unknown or unmeasured benchmark."""
    chosen = choose_benchmarks(benchmarks)
    for name, artifact in results.items():
        for benchmark in chosen:
            if benchmark.name not in artifact.manifest.summary:
                raise InputError(
                    f"{name} has no results of {benchmark.name}.",
                    "Set EXAMPLES to benchmarks that EVAL measures, and run the recipe again.",
                )
    return "\n".join([INTRODUCTION, *(_section(results, benchmark.name) for benchmark in chosen)])


def choose_document(correct: Mapping[str, set[Document]], documents: Iterable[Document]) -> tuple[Document, str]:
    """The document by the rule of the introduction, with the reason. `correct`: the correct ones by model."""
    first, alone = min(documents), sorted(alone_correct(correct).get(FAVOURED, ()))
    if alone:
        return alone[0], f"The first of {len(alone):,} that {FAVOURED} alone answers correctly."
    return first, f"The first one: {FAVOURED} alone answers no document correctly."


def alone_correct(correct: Mapping[str, set[Document]]) -> dict[str, set[Document]]:
    """By model, without the teacher: the documents that it alone of these models answers correctly."""
    students = {name: documents for name, documents in correct.items() if name != TEACHER}
    return {
        name: documents.difference(*(others for other, others in students.items() if other != name))
        for name, documents in students.items()
    }


def _section(results: Mapping[str, Artifact], benchmark: str) -> str:
    scores = {name: document_scores(artifact, benchmark) for name, artifact in results.items()}
    common = set.intersection(*(set(documents) for documents in scores.values()))
    if not common:
        raise InputError(f"The models have no document of {benchmark} in common.", "Evaluate all with the same EVAL.")
    correct = {name: {d for d in common if documents[d][0] == 1} for name, documents in scores.items()}
    alone = {name: f"{len(documents):,}" for name, documents in alone_correct(correct).items()}
    document, reason = choose_document(correct, common)
    rows = {name: read_document(artifact, benchmark, document) for name, artifact in results.items()}
    counts = _token_counts(results, benchmark, {name: str(row["response"]) for name, row in rows.items()})
    verdicts = {name: _verdict(row) for name, row in rows.items()}
    accuracies = {name: 100 * artifact.manifest.summary[benchmark]["value"] for name, artifact in results.items()}
    any_results, any_row = next(iter(results.values())), next(iter(rows.values()))
    written = BENCHMARKS[benchmark].max_new_tokens
    explanation = "" if written else " A response is the list of choices, each after its log-likelihood."
    lines = [
        f"## {benchmark}: document {document[1]} of {escape_markdown(document[0])}\n",
        f"{reason} The benchmark has {len(common):,} documents here.{explanation}\n",
        "| model | accuracy, % | alone correct | this document | tokens |",
        "|---|---|---|---|---|",
        *(
            f"| {escape_markdown(name)} | {accuracies[name]:.1f} | {alone.get(name, '')} | {verdicts[name]} "
            f"| {counts.get(name, '')} |"
            for name in results
        ),
        "\n### Prompt\n",
        _fenced(_without_shots(any_results, benchmark, document, str(any_row["prompt"]))),
        "\n### Target\n",
        _fenced(str(any_row["target"])),
    ]
    for name, row in rows.items():
        lines += [f"\n### {escape_markdown(name)}: {verdicts[name]}\n", _fenced(str(row["response"]))]
    return "\n".join([*lines, ""])


def _verdict(row: Mapping[str, object]) -> str:
    return format_verdict(float(str(row["score"]))) + (", truncated" if row["truncated"] else "")


def _token_counts(results: Mapping[str, Artifact], benchmark: str, responses: Mapping[str, str]) -> dict[str, int]:
    """The tokens of each model's response; empty for multiple choice, whose responses are not written."""
    if not BENCHMARKS[benchmark].max_new_tokens:
        return {}
    from tsdkd.stages.models.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(results[STUDENT].manifest.model("evaluated").name)
    return {name: len(tokenizer(response, add_special_tokens=False).input_ids) for name, response in responses.items()}


def _without_shots(results: Artifact, benchmark: str, document: Document, prompt: str) -> str:
    """The prompt without the lines that all prompts of the document's subtask begin with: shots, and instructions."""
    part = results.table_part(f"{BENCHMARKS[benchmark].file_stem}.parquet")
    column = results.read_part(part, ["prompt", "subtask"], pc.field("subtask") == document[0])["prompt"]
    prompts = [text.split("\n") for text in set(column.to_pylist())]
    shared = [*takewhile(lambda lines: len(set(lines)) == 1, zip(*prompts, strict=False))] if len(prompts) > 1 else []
    return "\n".join(prompt.split("\n")[len(shared) :])


def _fenced(text: str) -> str:
    """A text of a model or benchmark, shown as it is: the fence is longer than any in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{escape_controls(text)}\n{fence}"


def main() -> None:
    output, directory, benchmarks, *names = sys.argv[1:]
    try:
        with reading_inputs():
            results = {name: read_artifact(Path(directory) / name, "results") for name in names}
            page = figure_page(results, benchmarks.split())
        replace_text(Path(output), page)
    except InputError as error:
        show_error(error.cause, error.remedy)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
