"""The page that holds runs against each other, from stored results with hostile words in them."""

import itertools
import json
import re

import pytest
from report_runs import HOSTILE, Page
from stored_trials import values, write_ablation, write_run

from envs.errors import InputError
from rlhf_duplex.ablate.plan import describe
from rlhf_duplex.ablate.table import trial_rows
from rlhf_duplex.cli import main
from rlhf_duplex.evaluation import statistics
from rlhf_duplex.evaluation.metrics import change, read_results
from rlhf_duplex.evaluation.statistics import Estimate
from rlhf_duplex.report.comparison import build_comparison, shown_metrics, varied_numbers
from rlhf_duplex.report.effect_table import effect_rows
from rlhf_duplex.report.plots import Point, Row, condition_plot, front_plot, short_names
from rlhf_duplex.report.runs import Comparison, Run, leaves, read_ablation, read_runs, varied_keys

WEIGHT, BETA = "rewards.pause_handling.weight", "trainer.kl_beta"
CONDITIONS = {
    "full": ({WEIGHT: 1.0, BETA: 0.01}, 0.25, 0.5),
    f"without pause {HOSTILE}": ({WEIGHT: 0.0, BETA: 0.01}, 1.0, 0.3),
    "half": ({WEIGHT: 0.5, BETA: 0.01}, 0.5, 0.4),
    "worst": ({WEIGHT: 0.5, BETA: 0.1}, 1.0, 0.9),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_ablation(tmp_path_factory.mktemp("ablation") / "run", CONDITIONS)


@pytest.fixture(scope="module")
def page(folder):
    return build_comparison(read_ablation(folder), folder / "report.html").read_text(encoding="utf-8")


def test_the_page_is_whole_and_needs_nothing_from_elsewhere(page):
    parsed = Page(page)
    assert "http://" not in page
    assert "https://" not in page
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    referred = [i for _, a in parsed.tags for i in a.get("aria-labelledby", "").split()]
    assert set(referred) <= set(ids)
    assert sum(tag == "script" for tag, _ in parsed.tags) == 3  # its own, the player's, and the data
    assert not any(name.startswith("on") for _, attributes in parsed.tags for name in attributes)
    assert any(HOSTILE in data for data in parsed.text)
    assert all("scope" in attributes for tag, attributes in parsed.tags if tag == "th")


def test_links_lead_to_reports_that_are_there(page, folder):
    links = [a["href"] for tag, a in Page(page).tags if tag == "a" and not a["href"].startswith("#")]
    assert len(links) == 12  # a run each
    assert all((folder / link).is_file() for link in links)
    anchors = {a["href"][1:] for tag, a in Page(page).tags if tag == "a" and a["href"].startswith("#")}
    assert anchors <= {a["id"] for _, a in Page(page).tags if "id" in a}
    assert len(anchors) == 12  # a point of the trade-off each


def test_effects_are_in_words_and_marked(page):
    text = " ".join("".join(Page(page).text).split())
    assert "Effects against full" in text
    # 8 of 8 segments instead of 2 of 8 are taken over.
    assert "pause handling: takeover rate +75 points" in text
    assert "3 of 3 seeds8 segments" in text
    assert re.search(r'class="worse">✗ \+75 points', page)
    assert re.search(r'class="better">✓ \u22120\.\d\d s', page)


def test_every_run_has_a_card_with_the_same_two_segments(page):
    parsed = Page(page)
    cards = [a["id"] for tag, a in parsed.tags if a.get("class") == "card"]
    assert len(cards) == 13  # 12 runs and the policy before training
    players = [a for tag, a in parsed.tags if tag == "audio"]
    assert len(players) == 26
    assert sum(a.get("class") == "timeline" for tag, a in parsed.tags if tag == "svg") == 26
    assert sum(tag == "option" for tag, _ in parsed.tags) == 26


def test_the_data_of_the_script(page):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    rows = json.loads(found.group(1))
    assert [row["title"] for row in rows] == [
        "Pause handling: takeover rate",
        "Turn-taking: latency",
        "speech_rate: reward",
    ]
    assert [len(row["means"]) for row in rows] == [13, 13, 13]
    every = {str(i): [str(j) for j in range(i + 1, 13)] for i in range(12)}
    assert [{i: list(found) for i, found in row["pairs"].items()} for row in rows] == [every] * 3
    assert rows[0]["means"][:2] == ["25 %", "100 %"]
    # full and "without pause" of seed 0: 6 of 8 segments are taken over in the second alone.
    # Mean 0.75, deviation 0.463, t(7) 2.365: 0.75 +- 0.387, and t is 4.583, p 0.0025.
    assert rows[0]["pairs"]["0"]["1"] == ["+75 points", "+36 points", "+114 points", "p = 0.003", "8 segments", "worse"]


def test_failures_and_what_was_left_out_are_told(page):
    text = "".join(Page(page).text)
    assert "NonFiniteError: loss is nan" in text
    assert "failed, 2 attempts" in text
    assert "the base has no judged axis" in text


def test_who_dominates(page, folder):
    text = " ".join("".join(Page(page).text).split())
    # full (0.25, 0.5), without pause (1, 0.3) and half (0.5, 0.4) trade off; worst (1, 0.9) is beaten by all.
    best = re.search(r"On the front: (.*?)\.", text).group(1).split(", ")
    assert best
    assert not {"3_seed0", "7_seed1", "11_seed2"} & set(best)  # those of `worst`
    table = page.split("Dominated in this trade-off by")[1]
    row = re.search(r'<th scope="row">worst</th><td>(.*?)</td>', table).group(1)
    assert row.startswith("full, without pause")
    assert row.endswith("half")
    assert '<th scope="row">half</th><td>none</td>' in table


def test_keys_to_plot_against(folder):
    comparison = read_ablation(folder)
    # kl_beta is not alone in `worst`, and has but two values.
    assert varied_numbers(comparison) == {WEIGHT: ["full", f"without pause {HOSTILE}", "half"]}
    simplex = {f"{a}": {"x": a, "y": 2 - a} for a in (0.0, 1.0, 2.0)}
    whole = Comparison("t", (), simplex, "1.0")
    assert varied_numbers(whole) == {"x": ["0.0", "1.0", "2.0"], "y": ["0.0", "1.0", "2.0"]}


def test_p_values_are_corrected_over_the_conditions_of_a_metric(folder):
    comparison = read_ablation(folder)
    metrics = shown_metrics(comparison)
    rows = effect_rows(comparison, metrics)
    assert [row["name"] for row in rows] == [*CONDITIONS][1:]
    assert all(len(row["cells"]) == 3 for row in rows)
    # The rewards of `speech_rate` differ by noise alone.
    assert not any(row["cells"][2]["verdict"] for row in rows)


def test_asked_for_metrics():
    result = {"axes": {"turn_taking": {"latency": {"mean": 1.0}}}, "segments": {}}
    run = Run("a", "a", 0, None, after=result)
    assert shown_metrics(Comparison("t", (run,), {"a": {}}, "a", ("turn_taking.latency",))) == [
        ("turn_taking", "latency")
    ]
    with pytest.raises(InputError, match=r"turn_taking\.f1 is in no result: there are turn_taking\.latency"):
        shown_metrics(Comparison("t", (run,), {"a": {}}, "a", ("turn_taking.f1",)))


def test_any_runs_are_compared(tmp_path, capsys):
    before = values(0.75, 1.5, 9)
    for seed in (0, 1):
        for beta, pause in ((0.01, 0.25), (0.1, 0.75)):
            config = f"seed: {seed}\nrun_dir: x{seed}{beta}\ntrainer: {{kl_beta: {beta}, clip: 0.2}}\n"
            write_run(tmp_path / f"beta{beta}_{seed}", values(pause, 1.0, seed), before, config, episodes=False)
    folders = [tmp_path / f"beta{beta}_{seed}" for beta in (0.01, 0.1) for seed in (0, 1)]
    comparison = read_runs(folders)
    assert comparison.baseline == "beta0.01_0"
    assert comparison.conditions == {"beta0.01_0": {BETA: 0.01}, "beta0.1_0": {BETA: 0.1}}
    assert [(r.condition, r.seed) for r in comparison.runs] == [
        ("beta0.01_0", 0),
        ("beta0.01_0", 1),
        ("beta0.1_0", 0),
        ("beta0.1_0", 1),
    ]
    out = tmp_path / "page.html"
    assert main(["report", *map(str, folders), "--out", str(out)]) == 0
    assert f"wrote {out}" in capsys.readouterr().out
    assert "Against trainer.kl_beta" in "".join(Page(out.read_text()).text)
    assert "too few segments" not in out.read_text().split("<script")[0]


def test_a_folder_named_like_a_script_is_a_link_to_the_folder(tmp_path):
    for seed, name in enumerate(("javascript:alert(1);0", "50%#1")):
        config = f"seed: {seed}\nrun_dir: x\n"
        write_run(tmp_path / name, values(0.25, 1.0, 0), values(0.75, 1.5, 9), config, episodes=False)
    comparison = read_runs(sorted(tmp_path.iterdir()))
    page = build_comparison(comparison, tmp_path / "page.html").read_text(encoding="utf-8")
    links = {a["href"] for tag, a in Page(page).tags if tag == "a" and not a["href"].startswith("#")}
    assert links == {"javascript%3Aalert%281%29%3B0/report.html", "50%25%231/report.html"}


def test_a_value_that_is_no_number_leaves_the_script_alive(tmp_path):
    for seed, name in enumerate(("a", "b")):
        config = f"seed: {seed}\nrun_dir: x\n"
        write_run(tmp_path / name, values(0.25, 1.0, seed), values(0.75, 1.5, 9), config, episodes=False)
    path = tmp_path / "b" / "evaluation" / "after.json"
    result = json.loads(path.read_text())
    segments = result["segments"]["turn_taking"]["latency"]
    segments[next(iter(segments))] = float("nan")
    path.write_text(json.dumps(result))
    page = build_comparison(read_runs([tmp_path / "a", tmp_path / "b"]), tmp_path / "page.html").read_text()

    def refuse(constant):
        raise AssertionError(constant)

    json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL).group(1), parse_constant=refuse)


def test_names_of_conditions_keep_what_tells_them_apart():
    cut = short_names([f"turn_taking.prompt_seconds {value}" for value in (0, 2)])
    assert cut == ["turn_ta…mpt_seconds 0", "turn_ta…mpt_seconds 2"]
    # What differs stands in the middle: the common beginning goes.
    middle = short_names([f"without {axis} and with nothing else changed" for axis in ("pause", "turn")])
    assert [name[:3] for name in middle] == ["…pa", "…tu"]
    assert all(len(name) <= 21 for name in middle)
    assert short_names(["full", "half"]) == ["full", "half"]
    row = Row("turn_taking.prompt_seconds 2", [1.0], Estimate(1.0, 1.0, 1.0, 1))
    drawing = str(condition_plot("t", [row], "x", "c"))
    assert "<title>turn_taking.prompt_seconds 2</title>" in drawing  # the whole name
    assert "seconds 2</text>" in drawing


WEIGHTS = ("rewards.pause_handling.weight", "rewards.turn_taking.weight", "rewards.user_interruption.weight")


@pytest.mark.parametrize(
    "grid",
    [
        dict.fromkeys(WEIGHTS, (0.0, 1.0)),
        dict.fromkeys(WEIGHTS, (0.0, 0.5, 1.0)),
        {BETA: (0.01, 0.1), "optimiser.lr": (1e-5, 1e-4), "trainer.group_size": (4, 8)},
    ],
)
def test_no_two_conditions_of_a_grid_are_named_alike(grid):
    names = ["full", *(describe(dict(zip(grid, row, strict=True))) for row in itertools.product(*grid.values()))]
    labels = short_names(names)
    assert len(set(labels)) == len(names)
    assert all(len(text) <= 21 for text in labels)
    assert labels[0] == "full"
    for row, (name, text) in enumerate(zip(names, labels, strict=True), start=1):
        assert text[-4:] == name[-4:]  # the last value
        assert ": " not in text or text.startswith(f"{row}: ")


def test_names_that_nothing_but_their_row_tells_apart():
    assert short_names(["a", "a", "2: a", "b"]) == ["1: a", "2: a", "3: 2: a", "b"]


def test_runs_on_the_front_are_drawn_above_the_others():
    points = [Point(0, "best", 1.0, 1.0, True, 0), Point(1, "beaten", 1.0, 1.01, False, 7)]
    drawing = str(front_plot("t", points, "x", "y", "f"))
    assert drawing.index("#run-1") < drawing.index("#run-0")
    assert 'fill="none"' in drawing
    assert ">8</text>" in drawing  # the number of the condition, whose colour is another's, too


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{0}/a", "{0}/none"], "none is no run folder"),
        (["{0}/a", "{0}/a"], "the same run is given twice"),
        (["{0}/a", "{0}/c"], "have the same configuration and seed"),
        (["{0}/a", "{0}/b"], "b has no evaluation/after.json"),
    ],
)
def test_what_cannot_be_compared(tmp_path, capsys, arguments, message):
    for name in ("a", "c"):
        write_run(tmp_path / name, values(0.5, 1, 0), values(0.5, 1, 0), episodes=False)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.yaml").write_text("seed: 1\n")
    assert main(["report", *(argument.format(tmp_path) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_the_page_of_a_run_can_lie_elsewhere(tmp_path):
    run = write_run(tmp_path / "run", values(0.5, 1, 0), values(0.5, 1, 0), episodes=False)
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").is_file()
    assert not (run / "report.html").exists()


def test_an_ablation_without_a_finished_run(tmp_path):
    write_ablation(tmp_path / "run", {"full": ({}, 0.5, 1.0)}, seeds=())
    with pytest.raises(InputError, match="nothing to compare yet"):
        build_comparison(read_ablation(tmp_path / "run"), tmp_path / "page.html")
    (tmp_path / "run" / "ablation.json").write_text("{}")
    with pytest.raises(InputError, match=r"ablation\.json is damaged"):
        read_ablation(tmp_path / "run")


def test_what_differs_between_configurations():
    configs = [leaves({"seed": n, "trainer": {"clip": 0.2, "betas": [1, n]}, "checkpoint": "nano"}) for n in (0, 1)]
    assert varied_keys(configs) == ["trainer.betas"]


def test_signs_against_the_papers(tmp_path):
    from experiments.ablations.signs import sign_table

    conditions = {"full": ({}, 0.25, 0.5), "without pause": ({}, 1.0, 0.3), "without turn": ({}, 0.5, 0.7)}
    table = sign_table(read_ablation(write_ablation(tmp_path / "run", conditions)))
    rows = {line.split("|")[1].strip(): line for line in table.splitlines() if line.startswith("| without")}
    # The paper: without pause data +.32 and -.07, without turn data -.13 and +.18.
    assert "paper +; ours + (**+75 points" in rows["without pause"]
    assert "paper \u2212; ours \u2212 (**\u22120.20 s" in rows["without pause"]
    assert "paper \u2212; ours + (" in rows["without turn"]
    assert rows["without judge"].endswith("| not run | not run |")
    assert table.endswith("3 of 4 signs agree, 3 of the 3 beyond chance.")  # the fourth is not


def test_the_papers_measures():
    from experiments.ablations.signs import as_the_paper_measures

    turns = {
        "barge_in_rate": {"a": 1.0, "b": 0.0, "c": 0.0, "d": 0.25, "e": 0.5},
        "takeover_rate": {"a": 1.0, "b": 1.0, "c": 0.0, "d": 0.75, "e": 0.25},
        "latency": {"a": 0.7, "b": 0.5, "d": 0.4, "e": 0.6},
    }
    content = {"reward": {"x": 2.0, "a": 1.0}}
    segments = {"turn_taking": turns, "content": content, "user_interruption": {"reward": {"x": -1.0}}}
    found = as_the_paper_measures({"segments": segments})
    latency = found["segments"]["turn_taking"]["latency"]
    assert latency == pytest.approx({"a": 0.0, "b": 0.5, "d": 0.3, "e": 0.2})  # c was not answered
    assert found["segments"]["content"]["reward"] == {"x": 2.0}  # a is a turn
    assert turns["latency"]["a"] == 0.7
    assert as_the_paper_measures({"segments": {}}) == {"segments": {}}
    assert as_the_paper_measures(None) is None


def test_two_conditions_need_smaller_p_values_than_one():
    # Differences of mean 1 and deviation 1 over 8 segments: t 2.83, p 0.026; of two such, 0.051 each.
    moved = [-0.5, 0.0, 0.5, 1.0, 1.0, 1.5, 2.0, 2.5]

    def run(name, column):
        segments = {"turn_taking": {"latency": {f"t{i}": float(v) for i, v in enumerate(column)}}}
        return Run(
            name, name, 0, None, after={"axes": {"turn_taking": {"latency": {"mean": 0.0}}}, "segments": segments}
        )

    for names, verdict in ((["a"], "worse"), (["a", "b"], "")):
        runs = (run("base", [0.0] * 8), *(run(name, moved) for name in names))
        comparison = Comparison("t", runs, {r.name: {} for r in runs}, "base")
        rows = effect_rows(comparison, [("turn_taking", "latency")])
        assert [row["cells"][0]["verdict"] for row in rows] == [verdict] * len(names)


def test_a_row_holds_what_its_columns_say(tmp_path, monkeypatch):
    # Takeovers of 6 of 8 segments before, 2 of 8 after.
    run = write_run(tmp_path / "run", values(0.25, 0.5, 0), values(0.75, 1.5, 1), episodes=False)
    rows = trial_rows("t", "c", 3, {"trainer.clip": 0.1, "train_axes": ["a"]}, run / "evaluation")
    (row,) = (r for r in rows if (r["axis"], r["metric"]) == ("pause_handling", "takeover_rate"))
    assert (row["before"], row["after"], row["n"]) == (0.75, 0.25, 8)
    assert 0 <= row["low"] < 0.25 < row["high"] <= 0.75
    assert row["difference"] == pytest.approx(-0.5)
    assert row["difference_low"] < -0.5 < row["difference_high"] <= 0
    assert (row["trainer.clip"], row["train_axes"]) == (0.1, "['a']")
    # The interval is that of the run's own report, whose test, which takes most of the time, no column shows.
    before, after = (read_results(run / "evaluation" / f"{stage}.json") for stage in ("before", "after"))
    told = change(before, after, "pause_handling", "takeover_rate")
    assert (row["difference"], row["difference_low"], row["difference_high"]) == told[:3]
    monkeypatch.setattr(statistics, "_permutation_p", None)
    assert trial_rows("t", "c", 3, {"trainer.clip": 0.1, "train_axes": ["a"]}, run / "evaluation") == rows


def test_a_row_has_no_difference_of_a_reward_scored_otherwise(tmp_path):
    run = write_run(tmp_path / "run", values(0.25, 0.5, 0), values(0.75, 1.5, 1), episodes=False)
    for stage, rate in (("before", 1.0), ("after", 2.0)):
        path = run / "evaluation" / f"{stage}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"rewards": {"speech_rate": {"rate": rate}}}))
    rows = trial_rows("t", "c", 0, {}, run / "evaluation")
    missing = [row["axis"] for row in rows if row["difference"] is None]
    assert missing == ["speech_rate"]
