"""Methods with losses of their own: a user's file from end to end, whole steps, refusals by name."""

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.helpers.commands import refuse
from tests.helpers.commands import run as command
from tests.helpers.own_methods import OF_WHOLE_STEPS, page_examples, write_method
from tests.helpers.training import (
    CONFIG,
    SAMPLING,
    RecordingObserver,
    learn,
    logits_of_two_models,
    metrics,
    same_update,
    weights,
)
from tsdkd.artifacts.manifest import load_manifest
from tsdkd.artifacts.reader import read_artifact
from tsdkd.core import TSDKDConfig, entropy, opener_mask, top_entropy_mask
from tsdkd.errors import InputError
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.config.train import LoRAConfig, OnlineConfig, TrainConfig
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.methods import find_method, origin
from tsdkd.stages.methods.check import try_method
from tsdkd.stages.score.stage import score
from tsdkd.stages.train import loop
from tsdkd.stages.train.stage import train_offline, train_online
from tsdkd.stages.train.step_selection import StepSelection
from tsdkd.stages.train.teacher import with_signal
from tsdkd.stages.train.trial import try_objective

Contents = Callable[[Path], dict[str, bytes]]
KL_AT = "def select(features, options):\n    return {'d': %s}\n"
METHOD = """
from tsdkd.methods import Divergence, Entropy, Method, PolicyGradient, Ranking, TopK, ToDi, Weighted
{0}
METHOD = Method(name="mine", full_name="mine", description="mine", select=select, **{1})
"""


def settings(method: str | Path, *options: str, **more: object) -> TrainConfig:
    return replace(CONFIG, method=str(method), objective=TSDKDConfig(), method_options=options, **more)


def test_the_pages_example_from_end_to_end(
    run: Path, student: Path, teacher: Path, tmp_path: Path, contents: Contents
) -> None:
    """The page's file by the command line; the checkpoint copies it, and its config.yaml names the same run."""
    file = write_method(tmp_path / "unsure.py", page_examples()[0])
    paths = ["--rollouts", run / "rollouts", "--scores", run / "scores", "--student", student]
    train = ["train", *paths, "--method", file, "--method-option", "share=0.3", "--batch-size", 10]
    more = ["--micro-batch-size", 5, "--epochs", 3, "--learning-rate", "1e-3", "--precision", "float32"]
    shown = command(*train, *more, "--checkpoint", tmp_path / "c")
    assert "divergence" in shown
    assert f"unsure ({file})" in shown
    first, _, last = metrics(tmp_path / "c")
    rows = read_artifact(run / "rollouts", "rollouts").table().to_pylist()
    (s, t), mask = logits_of_two_models(rows, student, teacher)
    q, p = s.double().softmax(-1), t.double().softmax(-1)
    losses, chosen = (q * (q / p).log()).sum(-1), top_entropy_mask(entropy(s), mask, 0.3)
    expected = ((losses * chosen).sum(-1) / chosen.sum(-1)).mean()
    assert [first["divergence"], first["loss"]] == pytest.approx([float(expected)] * 2, rel=1e-4)
    tokens = chosen.sum(-1) / mask.sum(-1)
    assert first["divergence_selected"] == pytest.approx(float(tokens.mean()), rel=1e-5)
    assert last["loss"] < first["loss"]
    config = load_manifest(tmp_path / "c").config
    assert (config["method"], config["method_options"], config["objective"]) == ("unsure", ["share=0.3"], {})
    assert (tmp_path / "c" / "method.py").read_bytes() == file.read_bytes()
    card = (tmp_path / "c" / "README.md").read_text()
    assert "reverse KL at uncertain tokens" in card
    assert config["method_origin"]["sha256"] in card
    page = _report(tmp_path)
    assert "Method unsure: share=0.3." in page
    assert "Divergence" in page
    assert "Selected tokens" in page

    before = contents(tmp_path / "c")
    command("train", "--config", tmp_path / "c" / "config.yaml", "--checkpoint", tmp_path / "c")
    assert contents(tmp_path / "c") == before  # the copy, under its other name, has the same identity
    file.write_text(page_examples()[0] + "\n# changed\n")
    cause, _ = refuse(*train, *more, "--checkpoint", tmp_path / "c")
    assert "method_origin" in cause


def _report(run: Path) -> str:
    command("report", run, "--html", run / "report.html")
    return (run / "report.html").read_text()


FORMULAS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "todi": lambda p, q, _: (p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1),
    "se-kd": lambda p, q, mask: (p * (p / q).log()).sum(-1) * _top_weights(q, mask),
}


def _top_weights(q: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """L/n at the n tokens of greatest entropy: their mean as a mean over all L tokens."""
    chosen = top_entropy_mask(-(q * q.log()).sum(-1), mask, 0.2)
    return chosen * mask.sum(-1, keepdim=True) / chosen.sum(-1, keepdim=True)


@pytest.mark.parametrize("name", [*FORMULAS, "random-kd", "tsdkd-complement"])
def test_the_first_step_has_the_formula_and_training_improves(
    run: Path, student: Path, teacher: Path, tmp_path: Path, name: str
) -> None:
    options = ("k=4",) if name == "tsdkd-complement" else ()
    learn(run, student, tmp_path / "c", settings(name, *options, batch_size=10, epochs=3))
    first, *_, last = metrics(tmp_path / "c")
    rows = read_artifact(run / "rollouts", "rollouts").table().to_pylist()
    (s, t), mask = logits_of_two_models(rows, student, teacher)
    p, q = t.double().softmax(-1), s.double().softmax(-1)
    if name in FORMULAS:
        losses = FORMULAS[name](p, q, mask)
        expected = float((losses.where(mask, 0).sum(-1) / mask.sum(-1)).mean())
        assert first["loss"] == pytest.approx(expected, rel=1e-4)
    elif name == "random-kd":
        assert first["divergence_selected"] == pytest.approx(0.25, abs=0.1)
        assert first["divergence"] > 0
    else:
        opener = opener_mask(entropy(s), mask, 0.1)
        assert first["indirect"] == pytest.approx(_ranking_with_rest(s, t, opener), rel=1e-4)
        own = 0.1 * first["indirect"] + first["direct"] + first["entropy"]
        assert first["loss"] == pytest.approx(own, rel=1e-5)
        shares = [first[f"{term}_grad_share"] for term in ("indirect", "direct", "entropy")]
        assert sum(shares) == pytest.approx(1)
    assert last["loss"] < first["loss"]


def _ranking_with_rest(s: torch.Tensor, t: torch.Tensor, opener: torch.Tensor) -> float:
    """The Plackett-Luce loss over four candidates and the rest, with Python numbers."""
    total = 0.0
    for i, row in enumerate(opener):
        found = []
        for at in row.nonzero().squeeze(-1).tolist():
            candidates = s[i, at].topk(4).indices
            masses = []
            for logits in (s[i, at], t[i, at]):
                probs = logits.double().softmax(-1)
                masses.append([*probs[candidates].tolist(), 1 - float(probs[candidates].sum())])
            order = sorted(range(5), key=lambda j, m=masses[1]: -m[j])
            left, nll = 1.0, 0.0
            for j in order:
                nll -= float(torch.tensor(masses[0][j] / left).log())
                left -= masses[0][j]
            found.append(nll)
        total += sum(found) / len(found)
    return total / len(opener)


def test_micro_batches_do_not_change_a_selection_from_whole_steps(run: Path, student: Path, tmp_path: Path) -> None:
    file = write_method(tmp_path / "m.py")
    expected = learn(run, student, tmp_path / "whole", settings(file, micro_batch_size=4, epochs=1))
    for division in ({"micro_batch_size": 1}, {"micro_batch_size": None, "micro_batch_tokens": 150}):
        parts = tmp_path / f"{len(division)}"
        assert same_update(learn(run, student, parts, settings(file, epochs=1, **division)), expected, weights(student))
        for one, other in zip(metrics(tmp_path / "whole"), metrics(parts), strict=True):
            assert other == pytest.approx(one, rel=1e-3, abs=1e-5)
    changed = write_method(tmp_path / "m.py", OF_WHOLE_STEPS.replace("quantile(0.4)", "quantile(0.9)"))
    other = learn(run, student, tmp_path / "other", settings(changed, epochs=1))
    assert not same_update(other, expected, weights(student))


def test_the_pages_example_of_a_state_doubles_weights_above_the_running_mean(
    run: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is read once: the checkpoint holds it as it was at the start, although it changes during the run."""
    text, means, sums = page_examples()[2], [], []
    file = write_method(tmp_path / "harder.py", text)

    class Recording(StepSelection):
        def update(self, logs: Mapping[str, float]) -> None:
            file.unlink(missing_ok=True)
            means.append(self.state["mean"])
            sums.append([float(row["divergence"].weights.sum()) for row in self._selected.values()])
            super().update(logs)

    monkeypatch.setattr(loop, "StepSelection", Recording)
    learn(run, student, tmp_path / "c", settings(file, "decay=0.5"))
    expected = 0.0
    for entry, mean in zip(metrics(tmp_path / "c"), means, strict=True):
        assert mean == pytest.approx(expected)
        expected += 0.5 * (entry["divergence"] - expected)
    assert sums[0] == pytest.approx([2.0] * 4)
    assert {round(total) for row in sums[1:] for total in row} == {1, 2}
    assert (tmp_path / "c" / "method.py").read_text() == text


@pytest.mark.parametrize("name", ["of whole steps", "tsdkd-complement"])
def test_online_with_adapters(student: Path, teacher: Path, prompts: Path, tmp_path: Path, name: str) -> None:
    method = write_method(tmp_path / "m.py") if name == "of whole steps" else name
    options = ("k=4",) if name == "tsdkd-complement" else ()
    config = settings(method, *options, online=OnlineConfig(sampling=SAMPLING), lora=LoRAConfig(), epochs=1)
    train_online(prompts, str(student), str(teacher), tmp_path / "c", config)
    assert all(entry["loss"] > 0 for entry in metrics(tmp_path / "c"))


def test_a_step_is_selected_in_one_order_of_its_responses(tmp_path: Path) -> None:
    """Ties are broken alike, however micro-batches and ranks divide the responses."""
    select = "def select(features, options):\n    ties = features.uniform * 0\n"
    select += "    return {'d': features.batch_mean(features.batch_ranks(ties) < 4)}\n"
    arguments = "{'losses': {'d': Divergence.jsd(0)}, 'scope': 'batch', 'features': ('uniform',)}"
    method = find_method(str(write(tmp_path / "m.py", select, arguments)))
    responses = [
        {"sample_id": name, "prompt_id": name, "author": "student", "turn": 0, "response_ids": [1] * 3}
        for name in ("a", "b", "c")
    ]
    found = []
    for order in ([2, 0, 1], [0, 1, 2]):
        selection = StepSelection(method, {}, seed=0)
        selection.select_step([([responses[i]], {}) for i in order], step=0, steps=1, ranks=1)
        selected = selection.selected(responses, torch.ones(3, 3).bool())
        found.append(selected["d"].weights.tolist())
    assert found[0] == found[1] == [[0.75] * 3, [0.75, 0, 0], [0] * 3]


def test_a_run_without_any_weight_is_warned_of(run: Path, student: Path, tmp_path: Path) -> None:
    """Ranks at the teacher end at k, so none reaches 3."""
    text = METHOD.format(
        KL_AT % "features.mean(features.teacher_rank >= 3)",
        "{'losses': {'d': Divergence.jsd(0)}, 'features': ('teacher_rank',), 'options': {'k': 5}}",
    )
    file, observer = write_method(tmp_path / "m.py", text), RecordingObserver()
    learn(run, student, tmp_path / "c", settings(file, "k=1", epochs=1), observer=observer)
    check = "Check the conditions of `select` and its options; no teacher_rank exceeds k."
    assert observer.warnings == [
        f"At step 1 no token has a weight in any loss: the step has no gradient. {check}",
        f"No step of 3 has a token with a weight in any loss: the student has learned nothing. {check}",
    ]
    assert all(entry["loss"] == 0 for entry in metrics(tmp_path / "c"))


def test_random_numbers_depend_on_seed_step_and_response_alone(tmp_path: Path) -> None:
    samples = [{"sample_id": f"s{i}", "turn": 0, "response_ids": [1] * (i + 2), "author": "student"} for i in range(3)]

    def draw(seed: int, step: int, rows: list[int]) -> list[list[float]]:
        chosen = [samples[i] for i in rows]
        lengths = torch.tensor([len(sample["response_ids"]) for sample in chosen])
        mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(-1)
        selection = StepSelection(find_method("random-kd"), {"share": 0.2, "direction": "forward"}, seed)
        uniform = selection.context(chosen, mask, step, 9).uniform
        return [row[own].tolist() for row, own in zip(uniform, mask, strict=True)]

    together = draw(0, 1, [0, 1, 2])
    assert draw(0, 1, [2]) + draw(0, 1, [0]) == [together[2], together[0]]
    assert draw(0, 2, [0]) != [together[0]]
    assert draw(1, 1, [0]) != [together[0]]


def write(path: Path, select: str, arguments: str) -> Path:
    return write_method(path, METHOD.format(select, arguments))


@pytest.mark.parametrize(
    ("signal", "select", "arguments", "message"),
    [
        ("topk", KL_AT % "features.mean(features.mask)", "{'losses': {'d': ToDi()}}", "the loss d"),
        (
            "topk",
            KL_AT % "features.hellinger",
            "{'losses': {'d': Divergence.jsd(0)}, 'features': ('hellinger',)}",
            "the feature hellinger",
        ),
        ("ranks", KL_AT % "features.mean(features.mask)", "{'losses': {'d': Divergence.jsd(0)}}", "the loss d"),
        ("topk", KL_AT % "features.mean(features.mask)", "{'losses': {'d': Ranking(5)}}", "k is 5 in the loss d"),
        (
            "topk",
            KL_AT % "features.mean(features.mask)",
            "{'losses': {'d': TopK(Divergence.jsd(0), 9, 'teacher')}}",
            "k is 9 in the loss d",
        ),
        (
            "topk",
            KL_AT % "Weighted(features.mean(features.mask), 2.0)",
            "{'losses': {'d': Divergence.jsd(0)}}",
            "hold at temperature 1, not another",
        ),
        ("hidden", KL_AT % "features.mean(features.mask)", "{'losses': {'d': Ranking(10**4)}}", "vocabulary has only"),
    ],
)
def test_what_a_signal_does_not_give_is_refused_by_name(
    run: Path, student: Path, teacher: Path, tmp_path: Path, signal: str, select: str, arguments: str, message: str
) -> None:
    scores = run / "scores"
    if signal != "hidden":
        scores = tmp_path / "scores"
        score(run / "rollouts", str(student), str(teacher), scores, ScoreConfig(k=4, signal=signal, top_k=8))
    config = settings(write(tmp_path / "m.py", select, arguments))
    with pytest.raises(InputError, match=message):
        train_offline(run / "rollouts", scores, str(student), tmp_path / "c", config)
    assert not (tmp_path / "c").exists()


def test_a_served_teacher_gives_a_top_k() -> None:
    server = SimpleNamespace(top_k=8)
    for method, message in (
        ("todi", "the loss divergence"),
        ("tsdkd-complement", "the loss indirect"),
        ("se-kd", None),
    ):
        config = settings(method, online=OnlineConfig())
        with nullcontext() if message is None else pytest.raises(InputError, match=f"'topk' does not give {message}"):
            assert with_signal(config, config.online, {"": server}, try_objective(config)).teacher_top_k == 8


def test_a_method_may_need_no_teacher(student: Path, teacher: Path, prompts: Path, tmp_path: Path) -> None:
    rollouts, policy = tmp_path / "rollouts", GenerateConfig(max_new_tokens=8, policy="teacher")
    generate(prompts, None, rollouts, policy, teachers={"": str(teacher)})
    select = KL_AT % "Weighted(-features.mean(features.position < 3) * features.student_log_prob, factor=2.0)"
    arguments = "'features': ('student_log_prob',), 'needs_teacher': False}"
    own = page_examples()[1] + select
    file = write(tmp_path / "m.py", own, "{'losses': {'d': CrossEntropy()}, " + arguments)
    train_offline(rollouts, None, str(student), tmp_path / "c", settings(file, epochs=1))
    first = metrics(tmp_path / "c")[0]
    assert first["loss"] == pytest.approx(2 * first["d"], rel=1e-5)
    assert first["d"] > 0
    file = write(tmp_path / "m.py", select, "{'losses': {'d': PolicyGradient()}, " + arguments)
    with pytest.raises(InputError, match="does not learn from responses by teacher"):
        train_offline(rollouts, None, str(student), tmp_path / "d", settings(file))
    file = write(tmp_path / "m.py", select, "{'losses': {'d': Divergence.jsd(0)}, " + arguments)
    with pytest.raises(InputError, match="'responses' does not give the loss d"):
        train_offline(rollouts, None, str(student), tmp_path / "d", settings(file))


MEAN = KL_AT % "features.mean(features.mask)"
LOSSES = "{'losses': {'d': Divergence.jsd(0)}%s}"
OWN_LOSS = """
class Loss:
    needs = 'responses'
    def check_vocab(self, vocab): pass
    def values(self, tokens): return %s
"""
OF_LOSS = "{'losses': {'d': Loss()}}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (METHOD.format(KL_AT % "features.student_entropy", LOSSES % ""), "does not declare"),
        (METHOD.format(KL_AT % "1 / 0", LOSSES % ""), r"select of the method mine fails \(ZeroDivisionError"),
        (METHOD.format(KL_AT % "features.mask[0]", LOSSES % ""), "has shape"),
        (METHOD.format(KL_AT % "features.batch_mean(features.mask)", LOSSES % ""), "other weights beside other"),
        (
            METHOD.format(MEAN, "{'losses': {'d': Divergence.jsd(0), 'e': Entropy(), 'f': Entropy()}}"),
            r"gives no weights of e, f at step 1 of 10\.",
        ),
        (METHOD.format(MEAN, LOSSES % ", 'features': ('entropy_s',)"), "'entropy_s'. The nearest is 'teacher_entropy'"),
        (METHOD.format(MEAN, LOSSES % ", 'features': ('teacher_rank',)"), "needs a number k"),
        (METHOD.format(MEAN, LOSSES % ", 'features': 'jsd'"), "one word"),
        (METHOD.format(MEAN, LOSSES % ", 'scope': 'step'"), "scope of mine is 'step'"),
        (METHOD.format(MEAN, "{'losses': lambda options: options['x']}"), "losses of the method mine fails"),
        (METHOD.format(MEAN, LOSSES % ", 'state': {'a': 1}"), "has a state"),
        (METHOD.format(MEAN, LOSSES % ", 'scope': 'batch', 'state': {'a': {1, 2}}"), "cannot be saved"),
        (
            METHOD.format(MEAN, LOSSES % ", 'scope': 'batch', 'update': lambda *_: {}"),
            "update of the method mine returns",
        ),
        (METHOD.format(MEAN, LOSSES % ", 'options': {'a': None}"), "option a has the default None"),
        (METHOD.format(MEAN, LOSSES % ", 'authors': 'student'"), "authors of mine are 'student'"),
        (
            METHOD.format(KL_AT % "Weighted(features.mean(features.mask), factor='2')", LOSSES % ""),
            "factor of d is '2'",
        ),
        (METHOD.format(KL_AT % "Weighted(features.mean(features.mask), 1e999)", LOSSES % ""), "not above 0 and finite"),
        (METHOD.format(KL_AT % "features.mean(features.mask) / (9 - features.step)", LOSSES % ""), "at step 10 of 10"),
        (METHOD.format(MEAN, "{'losses': [Divergence.jsd(0)]}"), "no losses by name"),
        (METHOD.format(MEAN, "{'losses': {'d': lambda tokens: tokens.log_q}}"), "which is no loss"),
        (METHOD.format(OWN_LOSS % "0" + MEAN, "{'losses': {'d': Loss}}"), "which is no loss"),
        (METHOD.format(OWN_LOSS.replace("responses", "all") % "0" + MEAN, OF_LOSS), "which is no loss"),
        (METHOD.format(OWN_LOSS % "tokens.log_r" + MEAN, OF_LOSS), r"values of d of the method mine fails \(Attr"),
        (METHOD.format(OWN_LOSS % "tokens.log_q" + MEAN, OF_LOSS), "no differentiable value of each token"),
        (METHOD.format(OWN_LOSS % "tokens.log_q.sum()" + MEAN, OF_LOSS), "no differentiable value of each token"),
        (METHOD.format(OWN_LOSS % "tokens.log_q[:, 0].detach()" + MEAN, OF_LOSS), "no differentiable value"),
        (METHOD.format(OWN_LOSS % "tokens.log_q[:, 0].cumsum(0).flip(0)" + MEAN, OF_LOSS), "beside other tokens"),
        (METHOD.format(MEAN, "{}"), "only one of losses and select"),
        (METHOD.format(MEAN, LOSSES % "").replace('"mine"', '"gkd"'), "as one of tsdkd's"),
        (METHOD.format(MEAN, LOSSES % "").replace('"mine"', '"my method!"'), "is named 'my method!'"),
        (METHOD.format(MEAN, LOSSES % "").replace("{'d'", "{'loss'"), "the name of another entry"),
        ("import nothing_of_this_name", r"cannot be run \(ModuleNotFoundError"),
        ("METHOD = 3", "has no METHOD"),
        ("def", r"cannot be run \(SyntaxError"),
    ],
)
def test_methods_with_mistakes_are_refused(run: Path, student: Path, tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        learn(run, student, tmp_path / "c", settings(write_method(tmp_path / "m.py", text)))
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("selected", "message"),
    [
        ("{} if features.step == 1 else {'d': features.mean(features.mask)}", "no weights of d at step 2 of 6"),
        ("{'d': features.mean(features.mask) / abs(features.step - 2)}", "weights of d are not finite at step 3 of 6"),
    ],
)
def test_wrong_weights_of_steps_that_are_not_tried_are_refused(
    run: Path, student: Path, tmp_path: Path, selected: str, message: str
) -> None:
    file = write(tmp_path / "m.py", f"def select(features, options):\n    return {selected}\n", LOSSES % "")
    with pytest.raises(InputError, match=message):
        learn(run, student, tmp_path / "c", settings(file))


def test_a_state_that_can_no_longer_be_saved_is_refused(run: Path, student: Path, tmp_path: Path) -> None:
    """After the trial's three updates it can."""
    update = """
def update(state, losses, options):
    state['steps'] += 1
    state['seen'] = {1} if state['steps'] == 4 else []
"""
    more = ", 'scope': 'batch', 'state': {'steps': 0, 'seen': []}, 'update': update"
    file = write(tmp_path / "m.py", KL_AT % "features.mean(features.mask)" + update, LOSSES % more)
    with pytest.raises(InputError, match="state of the method mine holds values that cannot be saved"):
        learn(run, student, tmp_path / "c", settings(file))


@pytest.mark.parametrize(
    ("value", "saved"),
    [(float("nan"), True), ([1, "a", None], True), ((1,), False), ({1: 2}, False), ({1}, False)],
)
def test_a_state_is_saved_as_it_is(value: object, saved: bool) -> None:
    method = find_method("adakd")
    with nullcontext() if saved else pytest.raises(InputError, match="cannot be saved"):
        method.require_saved_state({"value": value})


def test_trials_follow_a_run(tmp_path: Path) -> None:
    """They begin with step 0, which may fill the state, and have the authors that the method learns from."""
    select = """
def select(features, options):
    if features.step == 0:
        features.state['length'] = float(features.length.double().mean())
    own = [{'student': 1.0, 'both': 2.0}[author] for author in features.authors]
    return {'d': features.mean(features.mask) * features.state['length'] * features.length.new_tensor(own)[:, None]}
"""
    more = ", 'scope': 'batch', 'state': {'length': None}, 'authors': ('student', 'both')"
    method = find_method(str(write(tmp_path / "m.py", select, LOSSES % more)))
    assert not try_method(method, {})


def test_wrong_options_are_refused(run: Path, student: Path, tmp_path: Path) -> None:
    paths = ["--rollouts", run / "rollouts", "--scores", run / "scores", "--student", student]
    for options, message in (
        (["--method-option", "shar=0.2"], "'shar=0.2' is no option of se-kd"),
        (["--method-option", "share"], "'share' is no option of se-kd"),
        (["--method-option", "share=much"], "share is 'much'"),
        (["--method-option", "share=nan"], "share is 'nan'"),
        (["--method-option", "share=0"], "share of tokens is 0"),
        (["--method-option", "share=0.1", "--method-option", "share=0.2"], "share is given twice"),
        (["--method-option", "direction=up"], "direction is 'up'"),
        (["--beta", "0.1"], "se-kd has no --beta"),
        (["--compile"], "--compile does not apply to se-kd"),
    ):
        cause, _ = refuse("train", *paths, "--method", "se-kd", *options, "--checkpoint", tmp_path / "c")
        assert message in cause
    for method, message in (
        ("gkd", "is no option of gkd"),
        ("none.py", "cannot be read"),
        ("nothing", "Unknown method"),
    ):
        options = ["--method-option", "a=1"] if method == "gkd" else []
        cause, _ = refuse("train", *paths, "--method", method, *options, "--checkpoint", tmp_path / "c")
        assert message in cause


def test_methods_of_installed_packages(
    run: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_method(tmp_path / "their_package.py", page_examples()[0])
    monkeypatch.syspath_prepend(tmp_path)
    distribution = type("Distribution", (), {"name": "their-package", "version": "1.2"})()
    values = {"unsure": "their_package:METHOD", "other": "their_package:METHOD", "broken": "no_such_module:METHOD"}
    entries = [EntryPoint(name, value, origin.ENTRY_POINTS) for name, value in values.items()]
    for entry in entries:
        vars(entry)["dist"] = distribution
    monkeypatch.setattr(origin, "entry_points", lambda group: entries)
    learn(run, student, tmp_path / "c", settings("unsure", epochs=1))
    recorded = load_manifest(tmp_path / "c").config
    assert recorded["method_origin"] == {"distribution": "their-package", "version": "1.2"}
    assert not (tmp_path / "c" / "method.py").exists()
    for name, message in (
        ("other", "named unsure"),
        ("broken", "cannot be loaded"),
        ("missing", "broken, other, unsure"),
    ):
        with pytest.raises(InputError) as refused:
            find_method(name)
        assert message in str(refused.value)
    monkeypatch.undo()
    assert read_artifact(tmp_path / "c", "checkpoint").manifest.config["method"] == "unsure"  # without the package


def test_trials_tell_whether_a_loss_has_a_temperature() -> None:
    todi = find_method("todi")
    assert not try_method(todi, todi.read_options(()))
    assert try_method(todi, todi.read_options(("temperature=2",)))


def test_a_recorded_name_of_a_file_runs_nothing(run: Path, student: Path, tmp_path: Path) -> None:
    file = write_method(tmp_path / "m.py", page_examples()[0])
    learn(run, student, tmp_path / "c", settings(file, epochs=1))
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    assert manifest["config"]["method"] == "unsure"
    file.unlink()
    shown = command("artifact", "show", tmp_path / "c", "--config")
    assert str(tmp_path / "c" / "method.py") in shown
    assert "unsure" in command("artifact", "show", tmp_path / "c")
