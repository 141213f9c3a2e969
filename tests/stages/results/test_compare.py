"""Comparison: errors and tests computed by hand, pairs by document, the paper's numbers as printed."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.results import binary_scores, results
from tsdkd.errors import InputError
from tsdkd.stages.results.benchmarks import PAPER_BENCHMARKS
from tsdkd.stages.results.compare import Score, compare
from tsdkd.stages.results.model_names import shorten_paths
from tsdkd.stages.results.paired import paired_difference
from tsdkd.stages.results.published import AVERAGE, PUBLISHED, find_table, published_tables
from tsdkd.stages.results.tables import comparison_tables


def test_wins_losses_and_mcnemar() -> None:
    """Six wins and one loss of ten: (1 + 7) / 2^7, twice."""
    model_scores, baseline_scores = (
        np.array([1, 1, 1, 1, 1, 1, 0, 1, 1, 0.0]),
        np.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 0.0]),
    )
    difference = paired_difference(model_scores, baseline_scores, np.ones(10))
    assert (difference.wins, difference.losses, difference.documents) == (6, 1, 10)
    assert difference.value == pytest.approx(0.5)
    assert difference.p == pytest.approx(2 * (1 + 7) / 2**7)
    assert difference.stderr == pytest.approx(np.std(model_scores - baseline_scores, ddof=1) / 10**0.5)
    assert paired_difference(model_scores, model_scores, np.ones(10)).p == 1


def test_mcnemar_is_exact_for_many_documents() -> None:
    from math import comb

    model_scores, baseline_scores = np.zeros(2000), np.zeros(2000)
    model_scores[:520], baseline_scores[520:1000] = 1, 1
    assert paired_difference(model_scores, baseline_scores, np.ones(2000)).p == pytest.approx(
        2 * sum(comb(1000, i) for i in range(481)) / 2**1000
    )


def test_graded_scores_are_bootstrapped() -> None:
    """The bootstrap's tail is that of the mean's error: a gain of two standard errors has p near 0.046."""
    generator = np.random.default_rng(1)
    gains = generator.normal(size=400)
    gains += 2 * gains.std(ddof=1) / 20 - gains.mean()
    difference = paired_difference(0.5 + gains, np.full(400, 0.5), np.ones(400))
    assert difference.value == pytest.approx(2 * difference.stderr)
    assert difference.p == pytest.approx(0.046, abs=0.01)


def test_weights_count_in_difference_and_error() -> None:
    model_scores, baseline_scores, weights = np.array([1.0, 0.5]), np.array([0.0, 0.5]), np.array([3.0, 1.0])
    difference = paired_difference(model_scores, baseline_scores, weights)
    assert difference.value == pytest.approx(3 / 4)
    assert difference.stderr == pytest.approx((2 * ((3 * 0.25) ** 2 + (1 * 0.75) ** 2)) ** 0.5 / 4)


def test_the_baseline_is_the_student_and_pairs_share_a_document(tmp_path: Path) -> None:
    artifacts = {
        "teacher": results(tmp_path / "t", {"gsm8k": binary_scores("1111")}),
        "student": results(tmp_path / "s", {"gsm8k": binary_scores("0011")}, first=1),
    }
    comparison = compare(artifacts)
    assert comparison.baseline == "student"
    difference = comparison.differences["teacher"]["gsm8k"]
    assert (difference.documents, difference.wins, difference.losses) == (3, 2, 0)  # documents 1, 2, 3
    assert comparison.scores["teacher"]["gsm8k"].documents == 4
    assert compare(artifacts, baseline="teacher").differences["student"]["gsm8k"].value == pytest.approx(-2 / 3)


def test_documents_with_several_samples_are_pairs_of_means(tmp_path: Path) -> None:
    """Three documents with two samples each: means 1, 1/2, 0 and 0, 1/2, 0."""
    artifacts = {
        "student": results(tmp_path / "s", {"aime24": binary_scores("000100")}, samples=2),
        "distilled": results(tmp_path / "d", {"aime24": binary_scores("111000")}, samples=2),
    }
    comparison = compare(artifacts)
    difference = comparison.differences["distilled"]["aime24"]
    assert (difference.wins, difference.losses, difference.documents) == (1, 0, 3)
    assert difference.value == pytest.approx(1 / 3)
    assert difference.stderr == pytest.approx(np.std([1, 0, 0], ddof=1) / 3**0.5)
    score = comparison.scores["distilled"]["aime24"]
    assert (score.documents, score.samples, score.responses) == (3, 2, 6)
    assert score.stderr == pytest.approx(np.std([1, 0.5, 0], ddof=1) / 3**0.5)
    accuracies, sampled = comparison_tables([comparison], ())
    assert accuracies[2][1][1:3] == ["50.0 ± 28.9 (avg@2)", "+33.3 ± 33.3"]
    assert sampled[1:] == (
        ["benchmark", "model", "pass@2", "truncated"],
        [["aime24", "student", "33.3 ± 33.3", "0.0"], ["aime24", "distilled", "66.7 ± 33.3", "0.0"]],
    )


def test_averages_weight_benchmarks_equally(tmp_path: Path) -> None:
    model_scores = {"gsm8k": binary_scores("1100"), "sciq": binary_scores("11")}
    baseline_scores = {"gsm8k": binary_scores("0100"), "sciq": binary_scores("10")}
    comparison = compare({"a": results(tmp_path / "a", model_scores), "b": results(tmp_path / "b", baseline_scores)})
    assert comparison.benchmarks == ("gsm8k", "sciq", AVERAGE)
    assert comparison.baseline == "a"
    assert comparison.scores["a"][AVERAGE].value == pytest.approx(0.75)
    assert comparison.scores["a"][AVERAGE].stderr == pytest.approx((1 / 12) ** 0.5 / 2)  # sciq's is 0
    difference = comparison.differences["b"][AVERAGE]
    assert difference.value == pytest.approx(-(1 / 4 + 1 / 2) / 2)
    assert difference.stderr == pytest.approx((0.25**2 + 0.5**2) ** 0.5 / 2)
    assert 0.1 < difference.p < 0.2  # 1.34 standard errors


def test_variants_of_one_benchmark_count_once_in_the_average(tmp_path: Path) -> None:
    """The variant that most models have counts, and a note names it."""
    strict, sciq = {"gsm8k:strict": binary_scores("0001")}, {"sciq": binary_scores("1111")}
    both = results(tmp_path / "a", {"gsm8k": binary_scores("0011")} | strict | sciq)
    alone = results(tmp_path / "b", strict | sciq)
    comparison = compare({"a": both})
    assert comparison.benchmarks == ("gsm8k", "gsm8k:strict", "sciq", AVERAGE)
    assert comparison.scores["a"][AVERAGE].value == pytest.approx((0.5 + 1) / 2)
    assert comparison.notes == ("average: each benchmark counts once, without gsm8k:strict (gsm8k counts)",)
    comparison = compare({"a": both, "b": alone})
    assert comparison.scores["a"][AVERAGE].value == comparison.scores["b"][AVERAGE].value == (0.25 + 1) / 2
    assert comparison.differences["b"][AVERAGE].documents == 8
    assert comparison.notes == ("average: each benchmark counts once, without gsm8k (gsm8k:strict counts)",)


def test_variants_of_a_single_benchmark_have_no_average(tmp_path: Path) -> None:
    scores = {"gsm8k": binary_scores("0011"), "gsm8k:strict": binary_scores("0001")}
    comparison = compare({"a": results(tmp_path / "a", scores, "Qwen2.5-1.5B")})
    assert AVERAGE not in comparison.benchmarks
    assert not any("average" in note for note in comparison.notes)


def test_a_model_without_one_of_the_benchmarks_has_no_average(tmp_path: Path) -> None:
    a = results(tmp_path / "a", {"gsm8k": binary_scores("10"), "sciq": binary_scores("10")})
    comparison = compare({"a": a, "b": results(tmp_path / "b", {"gsm8k": binary_scores("11")})})
    assert AVERAGE not in comparison.scores["b"]
    assert set(comparison.differences["b"]) == {"gsm8k"}


def test_a_difference_without_common_documents_is_skipped_alone(tmp_path: Path) -> None:
    model_scores, baseline_scores = (
        {"gsm8k": binary_scores("10")},
        {"gsm8k": binary_scores("11"), "sciq": binary_scores("1")},
    )
    a, b = results(tmp_path / "a", model_scores, first=5), results(tmp_path / "b", baseline_scores)
    comparison = compare({"b": b, "a": a, "c": b}, skip_unpaired=True)
    assert comparison.scores.keys() == {"a", "b", "c"}
    assert (comparison.differences["a"], comparison.differences["c"].keys()) == ({}, {"gsm8k", "sciq", AVERAGE})
    assert len(comparison.skipped) == 1
    assert comparison.skipped[0].startswith("a and b have no documents of gsm8k in common.")


def test_shortened_paths_differ() -> None:
    shortened = {("x/m", "x/n"): ["m", "n"], ("x/results/m", "y/results/m"): ["x/m", "y/m"]}
    shortened["x/m", "x/results/m"] = ["x/m", "results/m"]
    for paths, names in shortened.items():
        assert shorten_paths([Path(path) for path in paths]) == names


def test_other_documents_and_unknown_baselines_are_refused(tmp_path: Path) -> None:
    a = results(tmp_path / "a", {"gsm8k": binary_scores("10")})
    with pytest.raises(InputError, match="no documents of gsm8k in common"):
        compare({"a": a, "b": results(tmp_path / "b", {"gsm8k": binary_scores("10")}, first=5)})
    with pytest.raises(InputError, match="c has no results") as caught:
        compare({"a": a}, baseline="c")
    assert "Choose from: a" in caught.value.remedy


@pytest.mark.parametrize(
    ("name", "teachers_gsm8k"),
    [
        ("Qwen/Qwen2.5-1.5B-Instruct", 0.803),
        ("google/gemma-2-2b-it", 0.577),
        ("/models/Qwen3-8B", 0.829),
        ("Qwen/Qwen2.5-7B-Instruct", None),
    ],
)
def test_the_papers_rows_are_those_of_the_models_pair(name: str, teachers_gsm8k: float | None, tmp_path: Path) -> None:
    published = compare({"m": results(tmp_path / "m", {"gsm8k": binary_scores("10")}, name)}).published
    if teachers_gsm8k is None:
        assert not published
    else:
        assert published["teacher"]["gsm8k"].value == pytest.approx(teachers_gsm8k)
        assert {"student", "seqkd", "gkd", "tsdkd"} < published.keys()


def test_a_pair_can_be_named_and_its_average_is_the_papers(tmp_path: Path) -> None:
    comparison = compare(
        {"m": results(tmp_path / "m", {"gsm8k": binary_scores("1"), "ifeval": [(0.5, 2)]})}, paper="gemma2"
    )
    assert comparison.published["tsdkd"][AVERAGE].value == pytest.approx((0.553 + 0.665) / 2)


def test_the_average_covers_the_benchmarks_of_the_paper(tmp_path: Path) -> None:
    """Table 3 does not report sciq, so the average excludes it, and a note reports this."""
    model_scores = {"gsm8k": binary_scores("1100"), "sciq": binary_scores("1111"), "ifeval": [(0.9, 1)]}
    comparison = compare({"gate": results(tmp_path / "m", model_scores)}, paper="table-3")
    assert comparison.scores["gate"][AVERAGE].value == pytest.approx((0.5 + 0.9) / 2)
    assert comparison.published["gate"][AVERAGE].value == pytest.approx((0.583 + 0.542) / 2)
    assert "average: it covers gsm8k, ifeval, which the paper reports in table-3" in comparison.notes


@pytest.mark.parametrize(("paper", "other"), [("gemma2", "sciq"), ("figure-4", "sciq")])
def test_an_average_of_fewer_benchmarks_is_noted(paper: str, other: str, tmp_path: Path) -> None:
    """The table reports one of them, or the figure averages over others."""
    model_scores = {"gsm8k": binary_scores("1100"), other: binary_scores("1111")}
    comparison = compare({"m": results(tmp_path / "m", model_scores)}, paper=paper)
    assert comparison.scores["m"][AVERAGE].value == pytest.approx(0.5)
    assert any(note.startswith("average: it covers gsm8k, which") for note in comparison.notes)


def test_a_figure_is_compared_by_the_average_of_its_six_benchmarks_alone(tmp_path: Path) -> None:
    six = dict.fromkeys(find_table("figure-4").averaged, binary_scores("10"))
    all_of_them = compare({"k-20": results(tmp_path / "all", six | {"sciq": binary_scores("11")})}, paper="figure-4")
    assert all_of_them.published["k-20"] == {AVERAGE: Score(pytest.approx(0.445))}
    assert all_of_them.scores["k-20"][AVERAGE].value == pytest.approx(0.5)
    del six["math"]
    fewer = compare({"k-20": results(tmp_path / "fewer", six)}, paper="figure-4")
    assert not fewer.published
    assert any("only the average of gsm8k" in note for note in fewer.notes)


def test_a_table_without_any_of_the_benchmarks_is_noted(tmp_path: Path) -> None:
    comparison = compare({"gate": results(tmp_path / "m", {"embedded": binary_scores("10")})}, paper="table-3")
    assert not comparison.published
    assert comparison.notes == ("paper, table-3: the paper reports none of these benchmarks",)


def test_an_unknown_table_is_refused_with_the_list() -> None:
    with pytest.raises(InputError, match="'table-12' is not a table or figure of the paper") as caught:
        find_table("table-12")
    assert "qwen2.5, table-1, table-2, table-7, table-8, table-3, gemma2" in caught.value.remedy


def test_the_numbers_are_the_papers(real_data: Path) -> None:
    """They equal the separate transcription, under the names of recipes and options."""
    read = json.loads((real_data / "paper" / "tables.json").read_text())
    main = {"qwen2.5": "tables_1_2_7_8_qwen2.5_14b_to_1.5b", "gemma2": "table_4_gemma2_9b_to_2b"}
    main |= {"qwen3": "table_5_qwen3_8b_to_1.7b"}
    for pair, table in main.items():
        assert find_table(pair).rows == {
            NAMED.get(row, dashed(row)): dashes(found) for row, found in read[table].items()
        }
    assert [*find_table("table-3").rows.values()] == [dashes(row) for row in read["table_3_ablation_qwen2.5"]["rows"]]
    policies = read["table_6_off_vs_on_policy_qwen2.5"]
    assert [*find_table("table-6").rows.values()] == [dashes(policies[name]) for name in ("off_policy", "on_policy")]
    adapters = {f"lora-{dashed(row)}": dashes(found) for row, found in read["table_9_lora_qwen2.5"].items()}
    assert find_table("table-9").rows == adapters
    for figure, key in (("figure-4", "k"), ("figure-5", "em_ratio"), ("figure-6", "beta")):
        points = [row[AVERAGE] for row in find_table(figure).rows.values()]
        assert points == [*read["figures_average_score"][key].values()]
    assert {dashed(name): n for name, n in read["shots"].items()} == json.loads(PUBLISHED.read_text())["shots"]


NAMED = {"speculative_kd": "skd", "tsdkd_adaptive_c": "tsdkd-adaptive"}


def dashed(name: str) -> str:
    return name.replace("_", "-")


def dashes(row: dict[str, float]) -> dict[str, float]:
    return {dashed(name): value for name, value in row.items()}


def test_rows_of_one_name_have_the_same_numbers() -> None:
    """Across the tables of a pair; only MBPP differs, as the notes report."""
    table, rest = find_table("table-1").rows, [find_table(name).rows for name in ("table-3", "table-6")]
    for rows in rest:
        for name in rows.keys() & table.keys():
            differ = {one for one, value in rows[name].items() if value != table[name][one]}
            assert differ <= {"mbpp"}


def test_the_numbers_in_notes_follow_from_the_papers_tables(real_data: Path) -> None:
    """Every number of a note, computed from the separate transcription."""
    read = json.loads((real_data / "paper" / "tables.json").read_text())
    rows = {name: dashes(row) for name, row in read["tables_1_2_7_8_qwen2.5_14b_to_1.5b"].items()}
    table_1, table_6 = rows["tsdkd"], dashes(read["table_6_off_vs_on_policy_qwen2.5"]["on_policy"])
    here, there = table_1["mbpp"], table_6["mbpp"]
    assert find_table("table-1").notes == f"MBPP of tsdkd is {here} in this table and {there} in table-6"
    assert find_table("table-6").notes == f"MBPP of tsdkd is {there} in this table and {here} in table-1"
    for name in ("figure-4", "figure-5", "figure-6"):
        figure = find_table(name)
        assert {*figure.averaged} == {*table_6}
        averages = [round(sum(row[one] for one in figure.averaged) / 6, 1) for row in (table_1, table_6)]
        assert figure.notes.endswith(
            "the numbers of tsdkd in table-1 on the six benchmarks of table-6 give "
            f"{averages[0]} (those in table-6 give {averages[1]})"
        )
        assert figure.rows["tsdkd"][AVERAGE] == averages[0]
    ablation = [dashes(row) for row in read["table_3_ablation_qwen2.5"]["rows"]]
    assert "rows 1 and 5 repeat the numbers of gkd and tsdkd in table-1" in find_table("table-3").notes
    for row, name in ((ablation[0], "gkd"), (ablation[4], "tsdkd")):
        assert row.items() <= rows[name].items()
    curve = read["figures_average_score"]["opener_fraction"]
    assert curve == "peak at 0.1, worse at 1.0"
    assert "the curve peaks at c = 0.1 and is lower at 1.0" in find_table("figure-3").notes
    noted = {table.names[0] for table in published_tables() if table.notes}
    assert noted == {"qwen2.5", "table-3", "table-6", "figure-3", "figure-4", "figure-5", "figure-6"}


def test_every_table_has_known_benchmarks() -> None:
    for table in published_tables():
        for row in table.rows.values():
            assert row.keys() <= {*PAPER_BENCHMARKS, AVERAGE}
