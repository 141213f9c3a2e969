"""The columns of the tables of each kind of artifact."""

from collections.abc import Collection

import pyarrow as pa

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
SCHEMAS: dict[str, pa.Schema] = {
    "rollouts": pa.schema(
        [
            ("sample_id", pa.string()),
            ("prompt_id", pa.string()),
            ("source", pa.string()),
            ("messages", MESSAGES),
            ("prompt_ids", pa.list_(pa.int32())),
            ("response_ids", pa.list_(pa.int32())),  # from the engine, end token included
            ("response", pa.string()),  # decoded for display; never tokenised again
            ("finish_reason", pa.string()),  # "stop", "length", or "early" (cut on purpose)
            ("author", pa.string()),  # "student", "teacher", "both", "mixture" or "given"
            ("teacher_tokens", pa.int32()),  # tokens of the response that the teacher chose
        ]
    ),
    # Lists hold one entry per response token; those with k or K entries per token are flattened, token after token.
    "scores": pa.schema(
        [
            ("sample_id", pa.string()),
            ("student_entropy", pa.list_(pa.float32())),
            ("teacher_entropy", pa.list_(pa.float32())),
            ("student_log_prob", pa.list_(pa.float32())),  # of the sampled token
            ("teacher_log_prob", pa.list_(pa.float32())),
            ("candidates", pa.list_(pa.int32())),  # the student's k, best first
            ("ranks", pa.list_(pa.int16())),  # the teacher's rank of each, 0 is the most likely
            ("hidden", pa.large_binary()),  # (tokens, width) in the teacher's dtype; signal "hidden8": in int8
            ("hidden_scale", pa.list_(pa.float32())),  # signal "hidden8": one scale per token
            ("top_ids", pa.list_(pa.int32())),  # signal "topk": the teacher's K, best first
            ("top_log_probs", pa.list_(pa.float32())),
            ("divergence", pa.list_(pa.float32())),  # of the scored student; only with lossy signals
            ("signal_divergence", pa.list_(pa.float32())),  # the same from the recorded signal
        ]
    ),
    "results": pa.schema(
        [
            ("task", pa.string()),
            ("subtask", pa.string()),  # lm-eval's task, which numbers its documents
            ("document", pa.int32()),
            ("document_hash", pa.string()),
            ("metric", pa.string()),  # a document has one row per metric and sample
            ("prompt", pa.string()),
            ("response", pa.string()),  # of a multiple choice: every choice after its log-likelihood
            ("extracted", pa.string()),
            ("target", pa.string()),
            ("score", pa.float64()),
            ("weight", pa.float64()),  # of the document in the mean; IFEval's is its number of instructions
            ("truncated", pa.bool_()),  # the response reached its limit, or ended within a thought
            ("prompt_truncated", pa.bool_()),  # the prompt lost its beginning to fit the context
        ]
    ),
}
OPTIONAL = {
    "rollouts": pa.schema(
        [
            ("response_mask", pa.list_(pa.bool_())),  # False at context between turns, such as tool results
            ("teacher", pa.string()),  # the name of the prompt's teacher, of several
        ]
    ),
    "scores": pa.schema(
        [
            ("teacher", pa.string()),  # the name of the teacher that read the row, of several
            # of a served teacher, where teacher_entropy is an estimate:
            ("teacher_entropy_low", pa.list_(pa.float32())),
            ("teacher_entropy_high", pa.list_(pa.float32())),
            ("tied_candidates", pa.list_(pa.int16())),  # outside the top K: ranked last, in the student's order
        ]
    ),
    "results": pa.schema([("sample", pa.int32())]),  # the number of the response among those to the document
}
"""Columns that only some artifacts of a kind have; readers get nulls where they are absent."""


def schema_of(kind: str, names: Collection[str]) -> pa.Schema | None:
    """The columns of a kind, with those optional columns that are among `names`; None for a kind without tables."""
    optional = [field for field in OPTIONAL.get(kind, ()) if field.name in names]
    return pa.schema([*SCHEMAS[kind], *optional]) if kind in SCHEMAS else None


SIGNAL_COLUMNS: dict[str, tuple[str, ...]] = {
    "hidden": ("hidden",),
    "hidden8": ("hidden", "hidden_scale"),
    "topk": ("top_ids", "top_log_probs"),
    "ranks": (),
}
"""The columns that each teacher signal adds to scores."""
UNRECORDED = {*("hidden", "hidden_scale", "top_ids", "top_log_probs"), "divergence", "signal_divergence"}
"""Columns of scores that hold only nulls where the signal does not record them."""
NOT_EMPTY = {"messages", "prompt_ids", "response_ids", "student_entropy"}
"""Columns of lists that have an entry in every row."""
PER_TOKEN = {
    *("student_entropy", "teacher_entropy", "student_log_prob", "teacher_log_prob"),
    *("hidden_scale", "divergence", "signal_divergence"),
    *("teacher_entropy_low", "teacher_entropy_high", "tied_candidates"),
}
"""Columns of scores with one value per token."""
