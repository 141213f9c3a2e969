"""generate: prompts -> rollouts. Samples responses from the student (on-policy) or the teacher (off-policy).

Token ids are stored as the engine produced them, the end token included. Each part has its own seed, so an interrupted
run ends with the bytes of an uninterrupted one.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import torch
from transformers import PreTrainedTokenizerBase

from tsdkd.artifacts import SCHEMAS, Artifact, Manifest, Parent, Writer, digest, file_digest, relative
from tsdkd.errors import InputError
from tsdkd.stages.batches import by_length
from tsdkd.stages.config import GenerateConfig
from tsdkd.stages.models import LanguageModel, chat_ids, describe, libraries, load_model, load_tokenizer
from tsdkd.stages.prompts import Prompt, read_prompts
from tsdkd.stages.report import Reporter, Silent
from tsdkd.stages.sampling import sample


@dataclass(frozen=True, slots=True)
class Job:
    """One response to be sampled."""

    sample_id: str
    prompt: Prompt
    prompt_ids: list[int]


def generate(
    prompts: Path,
    model: str,
    output: Path,
    config: GenerateConfig,
    seed: int = 0,
    reporter: Reporter | None = None,
    overwrite: bool = False,
) -> Artifact:
    """Answer a prompts file with one model. Raises InputError before anything is written."""
    reporter = reporter or Silent()
    record = describe(config.policy, model)
    jobs, dropped = _jobs(read_prompts(prompts, config.column, config.limit), load_tokenizer(model), config)
    if not jobs:
        raise InputError(
            f"All {dropped} prompts of {prompts} are longer than {config.max_prompt_tokens} tokens.",
            "Raise --max-prompt-tokens.",
        )
    manifest = Manifest(
        kind="rollouts",
        config=asdict(config),
        seed=seed,
        parents=(Parent("prompts", file_digest(prompts), relative(prompts, output)),),
        models=(record,),
        libraries=libraries(),
    )
    with Writer.open(output, manifest, overwrite=overwrite) as writer:
        if writer.complete:
            reporter.say(f"{output} is complete: nothing to do.")
            return writer.artifact
        if dropped:
            reporter.say(f"{dropped} prompts longer than {config.max_prompt_tokens} tokens are left out.")
        engine = load_model(model, config.dtype)
        _require_room(engine, jobs, config)
        parts = [jobs[start : start + config.part_size] for start in range(0, len(jobs), config.part_size)]
        done = sum(len(part) for i, part in enumerate(parts) if writer.has(_file(i)))
        with reporter.progress(f"{config.policy} answers", len(jobs), "responses", done) as advance:
            for i, part in enumerate(parts):
                if not writer.has(_file(i)):
                    torch.manual_seed(int(digest([seed, i])[:15], 16))
                    writer.write_table(_file(i), _sample_part(engine, part, config, advance))
        return writer.finish(_summary(writer.artifact, dropped))


def _file(part: int) -> str:
    return f"part-{part:05d}.parquet"


def _jobs(prompts: list[Prompt], tokenizer: PreTrainedTokenizerBase, config: GenerateConfig) -> tuple[list[Job], int]:
    jobs, dropped = [], 0
    for prompt in prompts:
        ids = chat_ids(tokenizer, prompt.messages)
        if len(ids) > config.max_prompt_tokens:
            dropped += 1
            continue
        jobs += [Job(f"{prompt.prompt_id}-{n}", prompt, ids) for n in range(config.samples_per_prompt)]
    return jobs, dropped


def _require_room(engine: LanguageModel, jobs: list[Job], config: GenerateConfig) -> None:
    longest = max(len(job.prompt_ids) for job in jobs) + config.max_new_tokens
    if longest > engine.context:
        raise InputError(
            f"A prompt and its response could reach {longest} tokens; {engine.name} reads {engine.context}.",
            "Lower --max-new-tokens or --max-prompt-tokens.",
        )


def _sample_part(
    engine: LanguageModel, jobs: list[Job], config: GenerateConfig, advance: Callable[[int], None]
) -> pa.Table:
    responses: dict[int, list[int]] = {}
    for batch in by_length([len(job.prompt_ids) for job in jobs], size=config.batch_size):
        prompts = [jobs[i].prompt_ids for i in batch]
        sampled = sample(engine, prompts, config.max_new_tokens, config.temperature, config.top_p)
        responses.update(zip(batch, sampled, strict=True))
        advance(len(batch))
    rows = [_row(job, responses[i], engine) for i, job in enumerate(jobs)]
    return pa.Table.from_pylist(rows, SCHEMAS["rollouts"])


def _row(job: Job, response_ids: list[int], engine: LanguageModel) -> dict[str, object]:
    return {
        "sample_id": job.sample_id,
        "prompt_id": job.prompt.prompt_id,
        "source": job.prompt.source,
        "messages": job.prompt.messages,
        "prompt_ids": job.prompt_ids,
        "response_ids": response_ids,
        "response": engine.tokenizer.decode(response_ids, skip_special_tokens=True),
        "finish_reason": "stop" if response_ids[-1] in engine.end_ids else "length",
    }


def _summary(artifact: Artifact, dropped: int) -> dict[str, int]:
    table = artifact.table().select(["prompt_id", "response_ids", "finish_reason"])
    return {
        "prompts": pc.count_distinct(table["prompt_id"]).as_py(),
        "prompts_left_out": dropped,
        "responses": table.num_rows,
        "response_tokens": pc.sum(pc.list_value_length(table["response_ids"])).as_py(),
        "truncated": pc.sum(pc.equal(table["finish_reason"], "length")).as_py(),
    }
