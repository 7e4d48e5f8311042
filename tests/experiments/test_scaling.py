"""The fits of the scaling experiment, and its predictions."""

import json

import pytest

from experiments.algorithms.__main__ import METHODS, curves, page, table
from experiments.scaling.measure import fit
from experiments.scaling.predict import predictions
from rlhf_duplex.config import load_config


def test_fit_finds_the_constants_it_was_made_with():
    points = [{"one": 1.0, "tokens": tokens, "seconds": 0.5 + 0.25 * tokens} for tokens in (1.0, 4.0, 10.0)]
    found = fit(points, ("one", "tokens"))
    assert found["seconds_per_one"] == pytest.approx(0.5)
    assert found["seconds_per_tokens"] == pytest.approx(0.25)
    assert found["largest_relative_error"] == pytest.approx(0.0, abs=1e-9)


def test_predictions_of_the_7b():
    full, lora = (row for row in predictions((8,)))
    assert (full["kind"], lora["kind"]) == ("full", "LoRA")
    assert lora["sync"] == 0.0 < full["sync"]
    assert full["rollout"] == pytest.approx(lora["rollout"], rel=0.05)
    assert full["update"] > lora["update"]


def test_the_table_and_curves_of_algorithms(tmp_path):

    def result(value):
        axes = {axis: {"reward": {"mean": value}} for axis in ("pause_handling", "turn_taking")}
        return json.dumps({"axes": axes})

    for method, after in (("grpo", 0.5), ("ppo", 0.25)):
        for seed in (0, 1):
            folder = tmp_path / f"{method}_{seed}"
            (folder / "evaluation").mkdir(parents=True)
            (folder / "evaluation" / "before.json").write_text(result(0.0))
            (folder / "evaluation" / "after.json").write_text(result(after + seed))
            lines = [{"audio_seconds": 10.0, "reward/turn_taking": float(update + seed)} for update in range(3)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = table(tmp_path)
    assert "| grpo | 2 | 30 | +1.00 ± 0.50 | +1.00 ± 0.50 | - | - | 2, 2 | - |" in text
    audio, values = curves(tmp_path, "turn_taking")["ppo"]
    assert audio == [10.0, 20.0, 30.0]
    assert values == [0.5, 1.0, 1.5]  # the mean over the seeds, and over the updates so far
    written = page(tmp_path, text)
    assert "<svg" in written
    assert '<th scope="row">grpo</th><td>2</td><td>30</td>' in written


def test_every_method_is_a_configuration():
    for overrides in METHODS.values():
        load_config(None, overrides)
