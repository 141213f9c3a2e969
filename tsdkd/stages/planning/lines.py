"""The lines of a plan, one after the other: what each takes, given what those before it leave."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tsdkd.stages.config import EvalConfig, GenerateConfig, ScoreConfig, TrainConfig
from tsdkd.stages.objectives import find as objective
from tsdkd.stages.planning import estimates
from tsdkd.stages.planning.chain import Chain, Texts, finished
from tsdkd.stages.planning.estimates import Estimate
from tsdkd.stages.planning.models import key
from tsdkd.stages.planning.rates import Rates
from tsdkd.stages.rollouts.engines import choose, require_served
from tsdkd.stages.rollouts.jobs import AUTHORS
from tsdkd.stages.rollouts.prompts import Prompts
from tsdkd.stages.training.learning import precision_of

Names = Mapping[str, str | None]
"""Models by role; None where nobody named one."""


@dataclass(frozen=True)
class Row:
    stage: str
    on: str
    estimate: Estimate | None
    note: str = ""
    """In place of an estimate."""

    @classmethod
    def finished(cls, stage: str, on: str) -> "Row":
        """Its artifact is there, and would be left as it is."""
        return cls(stage, on, None, "finished already")


@dataclass
class Lines:
    chain: Chain
    rates: Rates

    def generate(self, prompts: Prompts, names: Names, output: Path, config: GenerateConfig, overwrite: bool) -> Row:
        config = replace(config, engine=choose(config))
        require_served(config.engine, config)
        roles = self._roles(names, {})
        on = f"{_listed(roles)}\n{prompts.place.name}"
        if finished(output) and not overwrite:
            return Row.finished("generate", on)
        models = {role: self.chain.model(name) for role, name in roles.items()}
        asked = self.chain.prompts(prompts, next(iter(models.values())), config.max_prompt_tokens)
        texts = asked.answered(config.samples_per_prompt, config.max_new_tokens)
        self.chain.texts[key(output)], self.chain.authors[key(output)] = texts, roles
        shares = {"student": config.student_share, "teacher": 1 - config.student_share}
        alone = len(AUTHORS[config.policy]) == 1
        answered = [1.0 if alone else shares[role] for role in models]
        return Row("generate", on, estimates.generate(list(models.values()), answered, texts, config, self.rates))

    def score(self, rollouts: Path, names: Names, output: Path, config: ScoreConfig, overwrite: bool) -> Row:
        roles = self._roles(names, self.chain.roles(rollouts, "rollouts"))
        on = _listed(roles)
        if finished(output) and not overwrite:
            return Row.finished("score", on)
        self.chain.authors[key(output)] = roles
        student, teacher = (self.chain.model(roles[role]) for role in ("student", "teacher"))
        return Row("score", on, estimates.score(student, teacher, self.chain.rollouts(rollouts), config, self.rates))

    def train(
        self,
        rollouts: Path | None,
        scores: Path | None,
        prompts: Prompts | None,
        names: Names,
        output: Path,
        config: TrainConfig,
        overwrite: bool,
    ) -> Row:
        """`prompts`: of live training, where there are no rollouts. With neither scores nor prompts, rollouts alone."""
        recorded = self.chain.roles(scores, "scores") if scores else {}
        if rollouts and not scores:
            recorded = self.chain.roles(rollouts, "rollouts")
        roles = self._roles(names, recorded)
        on = _short(roles["student"])
        if finished(output) and not overwrite:
            return Row.finished("train", on)
        student = self.chain.model(roles["student"])
        teacher = self.chain.model(roles["teacher"]) if objective(config.method).teacher else None
        self.chain.models[key(output)] = student.named(str(output))
        self.chain.authors[key(output)] = roles
        if config.live:
            sampling = replace(config.live.sampling, engine=choose(config.live.sampling))
            config = replace(config, live=replace(config.live, sampling=sampling))
        if rollouts:
            texts = self.chain.rollouts(rollouts)
        else:
            assert prompts is not None
            assert config.live is not None
            texts = self.chain.prompts(prompts, student, config.live.sampling.max_prompt_tokens)
        if config.live:
            texts = _answered_live(texts, config)
        return Row("train", on, estimates.train(student, teacher, texts, config, precision_of(config), self.rates))

    def evaluate(
        self, models: Mapping[str, str], output: Path, heldout: Path | None, config: EvalConfig, overwrite: bool
    ) -> Row:
        """`models`: by the names that their results have."""
        on = "\n".join(models)
        left = [name for label, name in models.items() if overwrite or not finished(output / label)]
        if not left:
            return Row.finished("eval", on)
        found = [self.chain.model(name) for name in left]
        read = self.chain.rollouts(heldout / "rollouts") if heldout else None
        return Row("eval", on, estimates.evaluate(found, read, config, self.rates))

    def prune(self, teacher: str | None, output: Path, drop: int) -> None:
        name = self._roles({"teacher": teacher}, {})["teacher"]
        self.chain.models[key(output)] = self.chain.model(name).without_layers(drop).named(str(output))

    @staticmethod
    def _roles(names: Names, recorded: Mapping[str, str]) -> dict[str, str]:
        """The names given, else recorded, else the embedded model's."""
        return {role: name or recorded.get(role) or f"embedded-{role}" for role, name in names.items()}


def _answered_live(texts: Texts, config: TrainConfig) -> Texts:
    """Responses of the student, as long as they may be, in place of its share of those recorded."""
    assert config.live is not None
    sampling, share = config.live.sampling, config.live.on_policy
    fresh = float(sampling.max_new_tokens)
    response = max(fresh, texts.response) if config.live.replay else share * fresh + (1 - share) * texts.response
    longest = sampling.max_prompt_tokens + sampling.max_new_tokens
    return Texts(min(texts.count, sampling.limit or texts.count), texts.prompt, response, longest, at_most=True)


def _listed(roles: Mapping[str, str]) -> str:
    return "\n".join(map(_short, roles.values()))


def _short(name: str) -> str:
    return Path(name).name
