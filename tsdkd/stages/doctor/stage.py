"""doctor: findings before a run. Files are checked first, then both models respond once to a sample of the prompts.

It writes nothing. A refusal of a stage becomes a finding, and the checks that need the refused input do not run.
"""

import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tsdkd.errors import InputError
from tsdkd.stages.config.chat import ChatConfig
from tsdkd.stages.config.doctor import DoctorConfig
from tsdkd.stages.data.prompts import Prompt, Prompts
from tsdkd.stages.data.randomness import random_integer
from tsdkd.stages.doctor import chat_prompts, model_files
from tsdkd.stages.doctor.benchmark_overlap import Overlap, QuestionIndex, check_overlaps, read_questions
from tsdkd.stages.doctor.chat_prompts import SampledPrompts
from tsdkd.stages.doctor.entropy_term import check_entropy_term
from tsdkd.stages.doctor.findings import Finding, Findings
from tsdkd.stages.doctor.model_files import ModelFiles, Pair, read_model_files
from tsdkd.stages.doctor.response_findings import Sampled, response_findings
from tsdkd.stages.doctor.responses import sample_both
from tsdkd.stages.models.chat import keeps_system
from tsdkd.stages.models.chat_format import reads_keywords
from tsdkd.stages.models.tokenizers import load_tokenizer
from tsdkd.stages.observer import Observer, SilentObserver


@dataclass
class ReadPrompts:
    """The prompts after one reading."""

    count: int
    skipped: Counter[str]
    sample: list[Prompt]
    overlaps: list[Overlap]
    with_system: int = 0
    """Prompts that begin with a system message."""


def diagnose(
    student: str,
    teacher: str,
    prompts: Path,
    config: DoctorConfig,
    benchmarks: Path | None = None,
    seed: int = 0,
    observer: Observer | None = None,
) -> Findings:
    """The findings about a student, a teacher and prompts. `benchmarks`: datasets as `tsdkd eval --data` takes them."""
    observer, findings, sampling = observer or SilentObserver(), Findings(), config.sampling
    pair = _read_pair(findings, student, teacher, config)
    source = Prompts(prompts, sampling.column, sampling.limit, sampling.system, sampling.config_name, sampling.split)
    index = findings.attempt("benchmarks", lambda: QuestionIndex(read_questions(benchmarks))) if benchmarks else None
    read = findings.attempt("prompts", lambda: _read_prompts(source, config.sample, seed, index))
    if index and read:
        findings.add("benchmarks", lambda: check_overlaps(index, read.overlaps, read.count))
    sampled = _write_sample(findings, pair, read, config) if pair and read else None
    if not (pair and sampled) or findings.stops:
        names = ", ".join(finding.name for finding in findings.stops)
        findings.all.append(
            Finding(
                "responses",
                "look",
                f"No response was sampled, because of: {names}.",
                "Correct these, and run tsdkd doctor again.",
            )
        )
        return findings
    responses = findings.attempt("responses", lambda: sample_both((student, teacher), sampled, config, seed, observer))
    if responses:
        both = Sampled(*responses)
        findings.all += response_findings(both, pair, config.objective, sampling.max_new_tokens)
        findings.add("entropy_term", lambda: check_entropy_term(both, config))
    return findings


def _read_pair(findings: Findings, student: str, teacher: str, config: DoctorConfig) -> Pair | None:
    """Both models by their files, with the findings about them; None if one cannot be read."""
    attention, dtype = config.sampling.attention, config.sampling.dtype
    student_files = findings.attempt("student", lambda: read_model_files("student", student, attention, config.chat))
    teacher_files = findings.attempt("teacher", lambda: _read_teacher_files(teacher, attention, config.chat))
    if not (student_files and teacher_files):
        return None
    pair = student_files, teacher_files
    findings.add("models", lambda: model_files.check_models(pair))
    findings.add("teacher_precision", lambda: model_files.check_precision(teacher_files, student_files, dtype))
    findings.add("tokenizer", lambda: model_files.check_tokenizer(pair))
    findings.add("vocabulary", lambda: model_files.check_vocabulary(pair))
    for model in pair:
        findings.add(f"{model.role}_end_tokens", partial(model_files.check_end_tokens, model))
        findings.all.append(model_files.check_pad_token(model))
        findings.add(f"{model.role}_begin_token", partial(chat_prompts.check_begin_tokens, model))
    findings.all.append(model_files.check_same_end(pair))
    findings.add("chat_template", lambda: chat_prompts.check_chat_template(pair))
    findings.add("system_role", lambda: chat_prompts.check_system_role(pair))
    findings.add("thinking_mode", lambda: chat_prompts.check_thinking(pair))
    return pair


def _read_teacher_files(name: str, attention: str | None, chat: ChatConfig) -> ModelFiles:
    """With the chat format, unless its keywords are none of the teacher's, which the findings then compare."""
    return read_model_files("teacher", name, attention, chat if reads_keywords(load_tokenizer(name), chat) else None)


def _read_prompts(source: Prompts, sample: int, seed: int, index: QuestionIndex | None) -> ReadPrompts:
    """Read the prompts once: count them, draw a sample, and compare each with the benchmarks' questions.

    Raises InputError for prompts that cannot be read, and where all are empty.
    """
    read = ReadPrompts(0, Counter(), [], [])

    def counted() -> Iterator[Prompt]:
        for prompt in source.read(read.skipped):
            read.count += 1
            read.with_system += prompt.messages[0]["role"] == "system"
            if index and (overlap := index.find(prompt)):
                read.overlaps.append(overlap)
            yield prompt

    read.sample = heapq.nsmallest(sample, counted(), key=lambda prompt: random_integer(seed, prompt.prompt_id))
    if not read.sample:
        raise InputError(f"All prompts of {source.path} are empty.", "Correct the file.")
    return read


def _write_sample(findings: Findings, pair: Pair, read: ReadPrompts, config: DoctorConfig) -> SampledPrompts | None:
    """The sampled prompts as token ids, with the findings about them; None if they are refused."""
    if any(finding.name == "chat_template" for finding in findings.stops):
        return None
    sampled = findings.attempt("prompts", lambda: chat_prompts.write_prompts(pair, read.sample, config.sampling))
    if sampled:
        joined = partial(_count_joined, pair, read)
        findings.add(
            "prompts", lambda: chat_prompts.check_prompts(read.count, read.skipped, sampled, config.sampling, joined())
        )
        findings.add("prompt_rendering", lambda: chat_prompts.check_rendering(pair, sampled))
        findings.add("context", lambda: chat_prompts.check_context(pair, sampled, config.sampling))
    return sampled


def _count_joined(pair: Pair, read: ReadPrompts) -> int:
    """The number of prompts whose system message joins the first user message."""
    return read.with_system if read.with_system and not keeps_system(pair[0].spec.tokenizer) else 0
