"""The columns of the tables of each kind of artifact."""

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
            ("finish_reason", pa.string()),  # "stop" or "length"
            ("author", pa.string()),  # "student", "teacher", "both" (speculative) or "mixture" (teacher-mixed)
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
            ("ranks", pa.list_(pa.int16())),  # the teacher's rank of each, 0 is its favourite
            ("hidden", pa.large_binary()),  # (tokens, width) in the teacher's dtype; signal "hidden8": in int8
            ("hidden_scale", pa.list_(pa.float32())),  # signal "hidden8": one scale per token
            ("top_ids", pa.list_(pa.int32())),  # signal "topk": the teacher's K, best first
            ("top_log_probs", pa.list_(pa.float32())),
            ("divergence", pa.list_(pa.float32())),  # of the scored student; only with lossy signals
            ("recorded_divergence", pa.list_(pa.float32())),  # the same from the recorded signal
        ]
    ),
    "results": pa.schema(
        [
            ("task", pa.string()),
            ("subtask", pa.string()),  # lm-eval's task; a document is numbered in it
            ("document", pa.int32()),
            ("hash", pa.string()),  # of the document
            ("metric", pa.string()),  # a document has a row for each that is reported
            ("prompt", pa.string()),
            ("answer", pa.string()),
            ("extracted", pa.string()),
            ("target", pa.string()),
            ("score", pa.float64()),
            ("weight", pa.float64()),  # of the document in the mean: IFEval counts instructions
            ("truncated", pa.bool_()),  # the answer was cut off at its limit
            ("prompt_cut", pa.bool_()),  # the prompt was too long and lost its beginning
        ]
    ),
}
