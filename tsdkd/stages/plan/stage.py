"""The lines of a plan, one after the other: what each takes, given what those before it leave."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tsdkd.stages.config.eval import EvalConfig
from tsdkd.stages.config.generate import AUTHORS, GenerateConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.config.train import TrainConfig
from tsdkd.stages.data.prompts import Prompts
from tsdkd.stages.engines.choice import choose_engine, require_engine_options
from tsdkd.stages.methods import find_method as objective
from tsdkd.stages.models.device import forward_precision
from tsdkd.stages.plan import estimates
from tsdkd.stages.plan.chain import Chain, Workload, is_complete
from tsdkd.stages.plan.estimates import Estimate
from tsdkd.stages.plan.models import path_key
from tsdkd.stages.plan.rates import Rates

Names = Mapping[str, str | None]
"""Models by role; None where nobody named one."""


@dataclass(frozen=True)
class PlanRow:
    stage: str
    on: str
    estimate: Estimate | None
    note: str = ""
    """In place of an estimate."""

    @classmethod
    def finished(cls, stage: str, on: str) -> "PlanRow":
        """Its artifact is there, and would be left as it is."""
        return cls(stage, on, None, "finished already")


@dataclass
class Planner:
    chain: Chain
    rates: Rates

    def generate(
        self, prompts: Prompts, names: Names, output: Path, config: GenerateConfig, overwrite: bool
    ) -> PlanRow:
        config = replace(config, engine=choose_engine(config))
        require_engine_options(config.engine, config)
        roles = self._roles(names, {})
        on = f"{_listed(roles)}\n{prompts.path.name}"
        if is_complete(output) and not overwrite:
            return PlanRow.finished("generate", on)
        models = {role: self.chain.model(name) for role, name in roles.items()}
        asked = self.chain.prompts(prompts, next(iter(models.values())), config.max_prompt_tokens)
        texts = asked.answered(config.samples_per_prompt, config.max_new_tokens)
        self.chain.texts[path_key(output)], self.chain.authors[path_key(output)] = texts, roles
        shares = {"student": config.student_fraction, "teacher": 1 - config.student_fraction}
        alone = len(AUTHORS[config.policy]) == 1
        answered = [1.0 if alone else shares[role] for role in models]
        return PlanRow("generate", on, estimates.generate(list(models.values()), answered, texts, config, self.rates))

    def score(self, rollouts: Path, names: Names, output: Path, config: ScoreConfig, overwrite: bool) -> PlanRow:
        roles = self._roles(names, self.chain.roles(rollouts, "rollouts"))
        on = _listed(roles)
        if is_complete(output) and not overwrite:
            return PlanRow.finished("score", on)
        self.chain.authors[path_key(output)] = roles
        student, teacher = (self.chain.model(roles[role]) for role in ("student", "teacher"))
        return PlanRow(
            "score", on, estimates.score(student, teacher, self.chain.rollouts(rollouts), config, self.rates)
        )

    def train(
        self,
        rollouts: Path | None,
        scores: Path | None,
        prompts: Prompts | None,
        names: Names,
        output: Path,
        config: TrainConfig,
        overwrite: bool,
    ) -> PlanRow:
        """`prompts`: of live training, where there are no rollouts. With neither scores nor prompts, rollouts alone."""
        recorded = self.chain.roles(scores, "scores") if scores else {}
        if rollouts and not scores:
            recorded = self.chain.roles(rollouts, "rollouts")
        roles = self._roles(names, recorded)
        on = _short(roles["student"])
        if is_complete(output) and not overwrite:
            return PlanRow.finished("train", on)
        student = self.chain.model(roles["student"])
        teacher = self.chain.model(roles["teacher"]) if objective(config.method).teacher else None
        self.chain.models[path_key(output)] = student.named(str(output))
        self.chain.authors[path_key(output)] = roles
        if config.online:
            sampling = replace(config.online.sampling, engine=choose_engine(config.online.sampling))
            config = replace(config, online=replace(config.online, sampling=sampling))
        if rollouts:
            texts = self.chain.rollouts(rollouts)
        else:
            assert prompts is not None
            assert config.online is not None
            texts = self.chain.prompts(prompts, student, config.online.sampling.max_prompt_tokens)
        if config.online:
            texts = _answered_live(texts, config)
        return PlanRow(
            "train",
            on,
            estimates.train(student, teacher, texts, config, forward_precision(config.precision), self.rates),
        )

    def evaluate(
        self, models: Mapping[str, str], output: Path, held_out: Path | None, config: EvalConfig, overwrite: bool
    ) -> PlanRow:
        """`models`: by the names that their results have."""
        on = "\n".join(models)
        left = [name for label, name in models.items() if overwrite or not is_complete(output / label)]
        if not left:
            return PlanRow.finished("eval", on)
        found = [self.chain.model(name) for name in left]
        read = self.chain.rollouts(held_out / "rollouts") if held_out else None
        return PlanRow("eval", on, estimates.evaluate(found, read, config, self.rates))

    def prune(self, teacher: str | None, output: Path, drop: int) -> None:
        name = self._roles({"teacher": teacher}, {})["teacher"]
        self.chain.models[path_key(output)] = self.chain.model(name).without_layers(drop).named(str(output))

    @staticmethod
    def _roles(names: Names, recorded: Mapping[str, str]) -> dict[str, str]:
        """The names given, else recorded, else the embedded model's."""
        return {role: name or recorded.get(role) or f"embedded-{role}" for role, name in names.items()}


def _answered_live(texts: Workload, config: TrainConfig) -> Workload:
    """Responses of the student, as long as they may be, in place of its share of those recorded."""
    assert config.online is not None
    sampling, share = config.online.sampling, config.online.student_fraction
    fresh = float(sampling.max_new_tokens)
    response = max(fresh, texts.response) if config.online.replay else share * fresh + (1 - share) * texts.response
    longest = sampling.max_prompt_tokens + sampling.max_new_tokens
    return Workload(min(texts.count, sampling.limit or texts.count), texts.prompt, response, longest, at_most=True)


def _listed(roles: Mapping[str, str]) -> str:
    return "\n".join(map(_short, roles.values()))


def _short(name: str) -> str:
    return Path(name).name
