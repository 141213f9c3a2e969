"""Findings from the chat templates of both models and from prompts that they write."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from tsdkd.errors import InputError
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.data.prompt_tokens import prompt_token_ids
from tsdkd.stages.data.prompts import Prompt
from tsdkd.stages.data.thoughts import THOUGHT_START
from tsdkd.stages.doctor.findings import Finding, finding
from tsdkd.stages.doctor.model_files import ModelFiles, Pair
from tsdkd.stages.models.chat import adds_system, keeps_system
from tsdkd.stages.models.chat_rendering import render_chat
from tsdkd.stages.models.context import require_context
from tsdkd.stages.models.tokenizers import require_chat_template
from tsdkd.stages.models.vocabulary import require_known_ids

SWITCHES = ("enable_thinking", "thinking")
"""Variables of chat templates that switch thinking on and off."""
HELLO = [{"role": "user", "content": "Hello"}]


@dataclass(frozen=True)
class SampledPrompts:
    """Prompts that responses are sampled to, as the student's chat template writes them."""

    prompts: list[Prompt]
    ids: list[list[int]]
    too_long: int
    """Number of sampled prompts that are longer than --max-prompt-tokens; `prompts` omits them."""


def check_chat_template(pair: Pair) -> Finding:
    """Whether both models have the same template. Raises InputError for a student without one."""
    student, teacher = (model.spec.tokenizer for model in pair)
    if student.chat_template is None:
        raise InputError(
            "The student has no chat template.",
            "Give --chat-template plain (a format for base models) or FILE, or use an instruction-tuned student.",
        )
    require_chat_template(student)
    values = {
        "equal": student.chat_template == teacher.chat_template,
        "teacher_has_one": teacher.chat_template is not None,
    }
    if values["equal"]:
        return finding("chat_template", "Both models have the same chat template.", values=values)
    problem = "The teacher has another template." if values["teacher_has_one"] else "The teacher has no template."
    remedy = "Save the teacher's template in the student's tokenizer, unless the student was trained with its own."
    return finding("chat_template", "The student's chat template writes the prompts.", problem, remedy, values=values)


def check_system_role(pair: Pair) -> Finding:
    templated = [model for model in pair if model.spec.tokenizer.chat_template is not None]
    keeps = {model.role: keeps_system(model.spec.tokenizer) for model in templated}
    adds = {model.role: adds_system(model.spec.tokenizer) for model in templated}
    words = ["refuses or drops a prompt's system message", "writes a prompt's system message"]
    own = ", and one of its own before a prompt without one"
    reason = " ".join(f"The {role}'s template {words[kept]}{own * adds[role]}." for role, kept in keeps.items())
    problem = (
        "The models treat system messages differently."
        if len(set(keeps.values())) > 1 or len(set(adds.values())) > 1
        else ""
    )
    remedy = "Give each prompt a system message that both templates write, or none that either of them adds."
    if not all(keeps.values()) and not problem:
        reason += " System messages join the first user message."
    return finding("system_role", reason, problem, remedy, values={"keeps": keeps, "adds": adds})


def check_thinking(pair: Pair) -> Finding:
    """Whether the chat templates make the models think before they respond."""
    modes = {model.role: _thinking_mode(model.spec.tokenizer) for model in pair}
    reason = " ".join(f"{role.capitalize()}: {mode}." for role, mode in modes.items())
    if len(set(modes.values())) > 1:
        problem = "The models differ, and both read prompts in the student's template."
    else:
        problem = "Thoughts are a part of the responses." if modes["student"] in {"on", "opened"} else ""
    remedy = (
        "Give a --max-new-tokens that holds thought and answer, or switch thinking off: "
        """--chat-template-kwargs '{"enable_thinking": false}', by the keyword of the template."""
    )
    return finding("thinking_mode", f"Thinking by the chat template: {reason}", problem, remedy, values=modes)


def _thinking_mode(tokenizer: PreTrainedTokenizerBase) -> str:
    """none: the template has no thoughts; on, off: the default of its switch; opened: each prompt opens a thought."""
    if tokenizer.chat_template is None:
        return "none"
    default = _hello(tokenizer)
    if any(thought.end() == len(default) for thought in THOUGHT_START.finditer(default)):
        return "opened"
    for switch in SWITCHES:
        on, off = (_hello(tokenizer, **{switch: value}) for value in (True, False))
        if on != off:
            return "on" if default == on else "off"
    return "none"


def _hello(tokenizer: PreTrainedTokenizerBase, **variables: bool) -> str:
    """Empty for a template that refuses it. Raises InputError for one that does not end."""
    try:
        return render_chat(tokenizer, HELLO, add_generation_prompt=True, **variables)
    except InputError:
        raise
    except Exception:  # a template is a program; the prompts find its refusals
        return ""


def check_begin_tokens(model: ModelFiles) -> Finding:
    """A prompt should begin with one BOS token if the tokenizer adds one to plain text, and never with two."""
    tokenizer, bos = model.spec.tokenizer, model.spec.tokenizer.bos_token_id
    name, values = f"{model.role}_begin_token", {"bos": bos, "count": 0, "added_to_text": False}
    if bos is None or tokenizer.chat_template is None:
        return finding(name, "No BOS token." if bos is None else "No chat template.", values=values)
    ids = list(tokenizer(_hello(tokenizer), add_special_tokens=False).input_ids)
    count = next((n for n, i in enumerate(ids) if i != bos), len(ids))
    values |= {"count": count, "added_to_text": list(tokenizer("Hello").input_ids[:1]) == [bos]}
    reason = f"BOS tokens ({tokenizer.bos_token}) at the start of a prompt: {count}."
    if count > 1:
        return finding(name, reason, "One BOS token is expected.", "Remove one from the chat template.", values=values)
    if values["added_to_text"] and not count:
        return finding(
            name,
            reason,
            "The tokenizer adds one to plain text.",
            "Write {{ bos_token }} at the start of the chat template if the model was trained with it.",
            values=values,
        )
    if values["added_to_text"]:
        reason += " A program that tokenizes the template's text with special tokens would write two; tsdkd does not."
    return finding(name, reason, values=values)


def write_prompts(pair: Pair, prompts: Iterable[Prompt], config: GenerateConfig) -> SampledPrompts:
    """Raises InputError for a prompt that the student's template or a vocabulary refuses, and if all are too long."""
    kept, ids, too_long = list[Prompt](), list[list[int]](), 0
    for prompt in prompts:
        prompt_ids = prompt_token_ids(pair[0].spec.tokenizer, prompt, day=None)
        if 0 < len(prompt_ids) <= config.max_prompt_tokens:
            kept.append(prompt)
            ids.append(prompt_ids)
        else:
            too_long += 1
    if not kept:
        raise InputError(
            f"All {too_long} sampled prompts are longer than {config.max_prompt_tokens} tokens.",
            "Raise --max-prompt-tokens.",
        )
    for model in pair:
        require_known_ids(model.spec.name, model.spec.vocab, max(map(max, ids)))
    return SampledPrompts(kept, ids, too_long)


def check_prompts(
    count: int, skipped: Counter[str], sampled: SampledPrompts, config: GenerateConfig, joined: int = 0
) -> Finding:
    """`joined`: prompts whose system message joins the first user message."""
    total, mean = len(sampled.ids) + sampled.too_long, sum(map(len, sampled.ids)) / len(sampled.ids)
    reason = (
        f"{count:,} prompts; {len(sampled.ids)} of {total} sampled ones have at most {config.max_prompt_tokens} "
        f"tokens, {mean:.0f} on average."
    )
    if joined:
        reason += f" The system messages of {joined:,} prompts join the first user message."
    kinds = [f"{n:,} rows are {kind}" for kind, n in sorted(skipped.items())]
    if sampled.too_long:
        kinds.append(f"{sampled.too_long / total:.0%} of the sampled prompts are too long")
    problem = f"Skipped: {', '.join(kinds)}." if kinds else ""
    remedy = (
        "Raise --max-prompt-tokens, or accept that skipped prompts get no response."
        if sampled.too_long
        else "Check that this is intended: skipped rows get no response."
    )
    return finding(
        "prompts",
        reason,
        problem,
        remedy,
        values={
            "prompts": count,
            "skipped": dict(skipped),
            "too_long": sampled.too_long / total,
            "prompt_tokens": mean,
            "system_joined": joined,
        },
    )


def check_rendering(pair: Pair, sampled: SampledPrompts) -> Finding:
    """Compares the sampled prompts in both chat templates; BOS tokens inside a prompt mean a template in its text."""
    teacher, bos = pair[1].spec.tokenizer, pair[0].spec.tokenizer.bos_token
    if teacher.chat_template is None:
        return finding("prompt_rendering", "The teacher has no chat template to compare prompts in.")
    different = sum(
        _teacher_ids(teacher, prompt) != ids for prompt, ids in zip(sampled.prompts, sampled.ids, strict=True)
    )
    values: dict[str, Any] = {"different": different, "compared": len(sampled.ids)}
    templated = sum(bool(bos) and any(bos in str(m["content"]) for m in prompt.messages) for prompt in sampled.prompts)
    if templated:
        problem, remedy = (
            f"{templated} contain the BOS token: they seem to be in a chat template already.",
            "Give messages or plain text: the template is applied to it.",
        )
        return finding(
            "prompt_rendering",
            f"Of {len(sampled.ids)} sampled prompts,",
            problem,
            remedy,
            values=values | {"templated": templated},
        )
    problem = "The teacher reads these prompts in another form than its own template's." if different else ""
    remedy = "Save the teacher's chat template in the student's tokenizer, unless the student was trained with its own."
    return finding(
        "prompt_rendering",
        f"{different} of {len(sampled.ids)} sampled prompts differ between the two chat templates.",
        problem,
        remedy,
        values=values,
    )


def _teacher_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Empty for a prompt that the template refuses."""
    try:
        return prompt_token_ids(tokenizer, prompt, day=None)
    except InputError:
        return []


def check_context(pair: Pair, sampled: SampledPrompts, config: GenerateConfig) -> Finding:
    """Raises InputError if a sampled prompt with a response of --max-new-tokens exceeds a model's context."""
    specs, longest = [model.spec for model in pair], max(map(len, sampled.ids))
    require_context(specs, longest + config.max_new_tokens)
    asked, context = config.max_prompt_tokens + config.max_new_tokens, min(spec.context for spec in specs)
    reached = longest + config.max_new_tokens
    reason = (
        f"Sampled prompts with their responses can reach {reached:,} tokens; the models read {specs[0].context:,} and "
        f"{specs[1].context:,}."
    )
    problem = (
        f"--max-prompt-tokens and --max-new-tokens allow {asked:,}: a longer prompt would be refused."
        if asked > context
        else ""
    )
    return finding(
        "context",
        reason,
        problem,
        f"Give --max-prompt-tokens {max(1, context - config.max_new_tokens)}.",
        values={"longest": reached, "asked": asked} | {m.role: m.spec.context for m in pair},
    )
