"""plan: estimates each command of a chain, from existing artifacts and those that earlier commands will write."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tsdkd.artifacts.manifest import teacher_name
from tsdkd.stages.config.eval import EvalConfig
from tsdkd.stages.config.generate import GIVEN, GenerateConfig, require_effective
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.config.train import TrainConfig
from tsdkd.stages.data.prompts import Prompts
from tsdkd.stages.engines.choice import choose_engine, require_engine_options
from tsdkd.stages.methods import find_method
from tsdkd.stages.models.device import forward_precision
from tsdkd.stages.models.layers import drop_error
from tsdkd.stages.plan import estimates
from tsdkd.stages.plan.chain import Chain, Workload, is_complete
from tsdkd.stages.plan.estimates import Estimate
from tsdkd.stages.plan.models import PlannedModel, path_key
from tsdkd.stages.plan.rates import Rates

GivenModels = Mapping[str, str | None]
"""Model names by role; None for a model that no option names."""


@dataclass(frozen=True)
class PlanRow:
    """One command of a plan."""

    stage: str
    inputs: str
    """Models and prompts, one per line."""
    estimate: Estimate | None
    note: str = ""
    """Shown instead of an estimate."""

    @classmethod
    def complete(cls, stage: str, inputs: str) -> "PlanRow":
        """A command that is skipped because its artifact is complete."""
        return cls(stage, inputs, None, "already complete")


@dataclass
class Planner:
    """Estimates the commands of a chain in order; each method also records the output of its command."""

    chain: Chain
    rates: Rates

    def generate(
        self, prompts: Prompts, models: GivenModels, output: Path, config: GenerateConfig, overwrite: bool
    ) -> PlanRow:
        require_effective(config)
        if config.policy != GIVEN:
            config = replace(config, engine=choose_engine(config))
            require_engine_options(config.engine, config)
        roles = _resolve_roles(models, {})
        inputs = f"{_short_names(roles)}\n{prompts.path.name}"
        if is_complete(output) and not overwrite:
            return PlanRow.complete("generate", inputs)
        self.chain.written_teacher_by[path_key(output)] = config.teacher_by
        planned = {role: self.chain.model(name) for role, name in roles.items()}
        prompts_alone = self.chain.prompts(prompts, next(iter(planned.values())), config.max_prompt_tokens, config.chat)
        workload = prompts_alone.with_responses(config.samples_per_prompt, config.response_limit)
        self.chain.written_rollouts[path_key(output)] = workload
        self.chain.written_roles[path_key(output)] = roles
        if config.policy == GIVEN:
            return PlanRow("generate", inputs, None, "records given responses")
        by_student, by_teachers = 1.0, 1.0
        if config.policy == "mixed":
            by_student, by_teachers = config.student_fraction, 1 - config.student_fraction
        responding = [(planned["student"], by_student)] if "student" in planned else []
        if config.policy != "student":  # whose teachers only add end tokens
            responding += [(model, by_teachers * fraction) for model, fraction in self._teachers(roles, workload)]
        estimate = estimates.estimate_generate(responding, workload, config, self.rates)
        return PlanRow("generate", inputs, estimate)

    def score(self, rollouts: Path, models: GivenModels, output: Path, config: ScoreConfig, overwrite: bool) -> PlanRow:
        roles = _resolve_roles(models, self.chain.roles(rollouts, "rollouts"))
        inputs = _short_names(roles)
        if is_complete(output) and not overwrite:
            return PlanRow.complete("score", inputs)
        self.chain.written_roles[path_key(output)] = roles
        student, workload = self.chain.model(roles["student"]), self.chain.rollouts(rollouts)
        teachers = self._teachers(roles, workload)
        return PlanRow("score", inputs, estimates.estimate_score(student, teachers, workload, config, self.rates))

    def train(
        self,
        rollouts: Path | None,
        scores: Path | None,
        prompts: Prompts | None,
        models: GivenModels,
        output: Path,
        config: TrainConfig,
        overwrite: bool,
    ) -> PlanRow:
        """`prompts` are used for online training without rollouts; rollouts alone suffice without a teacher signal."""
        recorded = self.chain.roles(scores, "scores") if scores else {}
        if rollouts and not scores:
            recorded = self.chain.roles(rollouts, "rollouts")
        roles = _resolve_roles(models, recorded)
        inputs = _short_name(roles["student"])
        if is_complete(output) and not overwrite:
            return PlanRow.complete("train", inputs)
        student = self.chain.model(roles["student"])
        self.chain.written_models[path_key(output)] = student.renamed(str(output))
        self.chain.written_roles[path_key(output)] = roles
        if config.online:
            engine = choose_engine(config.online.sampling, quantized=bool(config.quantize))
            sampling = replace(config.online.sampling, engine=engine)
            config = replace(config, online=replace(config.online, sampling=sampling))
        if rollouts:
            workload = self.chain.rollouts(rollouts)
        else:
            assert prompts is not None
            assert config.online is not None
            workload = self.chain.prompts(prompts, student, config.online.sampling.max_prompt_tokens, config.chat)
        if config.online:
            workload = _online_workload(workload, config)
        precision = forward_precision(config.precision)
        teachers = self._teachers(roles, workload) if find_method(config.method).needs_teacher else []
        estimate = estimates.estimate_train(student, teachers, workload, config, precision, self.rates)
        return PlanRow("train", inputs, estimate)

    def evaluate(
        self, models: Mapping[str, str], output: Path, held_out: Path | None, config: EvalConfig, overwrite: bool
    ) -> PlanRow:
        """models: model names by the names of their results."""
        inputs = "\n".join(models)
        names = [name for result, name in models.items() if overwrite or not is_complete(output / result)]
        if not names:
            return PlanRow.complete("eval", inputs)
        planned = [self.chain.model(name) for name in names]
        held_out_workload = self.chain.rollouts(held_out / "rollouts") if held_out else None
        return PlanRow("eval", inputs, estimates.estimate_eval(planned, held_out_workload, config, self.rates))

    def _teachers(self, roles: Mapping[str, str], workload: Workload) -> list[tuple[PlannedModel, float]]:
        """Each teacher among the roles with the fraction of the prompts that are its own."""
        named = {name: model for role, model in roles.items() if (name := teacher_name(role)) is not None}
        models = [self.chain.model(model) for model in named.values()]
        return list(zip(models, workload.teacher_fractions([*named]), strict=True))

    def prune(self, teacher: str | None, output: Path, drop: int) -> None:
        name = _resolve_roles({"teacher": teacher}, {})["teacher"]
        model = self.chain.model(name)
        layers = model.config.get_text_config().num_hidden_layers
        if not 0 < drop < layers:
            raise drop_error(drop, name, layers)
        self.chain.written_models[path_key(output)] = model.without_layers(drop).renamed(str(output))


def _resolve_roles(given: GivenModels, recorded: Mapping[str, str]) -> dict[str, str]:
    """By role: the given name, else the recorded one, else the embedded model's."""
    return {role: name or recorded.get(role) or f"embedded-{role}" for role, name in given.items()}


def _online_workload(workload: Workload, config: TrainConfig) -> Workload:
    """Replace the student's fraction of the responses by responses of the largest length."""
    assert config.online is not None
    sampling, fraction = config.online.sampling, config.online.student_fraction
    sampled, recorded = float(sampling.response_limit), workload.response_tokens
    response_tokens = fraction * sampled + (1 - fraction) * recorded
    if config.online.replay:
        response_tokens = max(sampled, recorded)
    max_tokens = sampling.max_prompt_tokens + sampling.response_limit
    count = min(workload.count, sampling.limit or workload.count)
    return replace(workload, count=count, response_tokens=response_tokens, max_tokens=max_tokens, is_upper_bound=True)


def _short_names(roles: Mapping[str, str]) -> str:
    return "\n".join(map(_short_name, roles.values()))


def _short_name(name: str) -> str:
    return Path(name).name
