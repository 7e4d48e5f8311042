"""Training on nano with a judge over HTTP that dies on the way and comes back, and that babbles the key."""

import io
import json
import time

import pytest
from rich.console import Console

from envs import write_manifest
from experiments.judge.server import MODEL, Handler, JudgeServer
from rlhf_duplex.cli import main
from rlhf_duplex.config import load_config
from rlhf_duplex.config_files import check_resumed
from rlhf_duplex.run import train
from rlhf_duplex.trainer import Trainer

KEY = "sk-a-key-that-must-not-be-written"


class Babbling(Handler):
    """Repeats the caller's key in every verdict."""

    def send(self, status, body, headers=None):
        if "choices" in body:
            message = body["choices"][0]["message"]
            said = json.loads(message["content"])
            said["reason"] += " " + self.headers["Authorization"]
            message["content"] = json.dumps(said)
        super().send(status, body, headers)


def test_a_run_goes_on_without_its_judge_and_writes_no_key(tmp_path, monkeypatch, caplog, nano_segments):
    monkeypatch.setenv("KEY_OF_JUDGE", KEY)
    server = JudgeServer(handler=Babbling)
    server.__enter__()
    port, phases = server.server_port, []
    step = Trainer.step

    def step_with_accidents(self):
        nonlocal server
        if self.update == 1:
            server.__exit__()
        if self.update == 2:
            server = JudgeServer(port=port, handler=Babbling)
            server.__enter__()
            time.sleep(0.1)
        phases.append(self.update)
        return step(self)

    monkeypatch.setattr(Trainer, "step", step_with_accidents)
    turns = sorted((s for s in nano_segments if s.axis == "turn_taking"), key=lambda s: s.duration)
    write_manifest(tmp_path / "segments.jsonl", turns[:2])
    judge = f"{{base_url: '{server.base_url}', model: {MODEL}, key_variable: KEY_OF_JUDGE, cache: '{tmp_path}/cache', "
    (tmp_path / "run.yaml").write_text(
        f"run_dir: {tmp_path}/run\nsegments: {tmp_path}/segments.jsonl\n"
        "trainer: {updates: 3, groups: 2, group_size: 3, minibatch: 8}\ncontext: {probability: 0.0, lead_in: 0.4}\n"
        "rewards:\n  turn_taking: {weight: 1.0}\n"
        f"  content: {{weight: 1.0, judge: {judge} retries: 0, failures: 2, cooldown: 0.05, timeout: 5}}}}\n"
    )
    config = load_config(tmp_path / "run.yaml")
    screen = io.StringIO()
    try:
        train(config, Console(file=screen, width=130))
    finally:
        server.__exit__()
    assert phases == [0, 1, 2]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    figures = [(line["content/judged"], line["content/failed"]) for line in lines]
    judged, failed = zip(*figures, strict=True)
    assert judged[0] > 0
    assert failed[0] == 0
    assert (judged[1], failed[1] > 0) == (0, True)
    assert judged[2] > 0
    assert failed[2] == 0
    # Nothing is counted as 0: without a verdict the axis has no mean, or that of those who said nothing.
    assert lines[1].get("reward/content", 0.0) == 0.0
    assert lines[1].get("reward_std/content", 0.0) == 0.0
    assert all(line["optimiser_steps"] > 0 for line in lines)
    assert all(line["content/calls"] >= line["content/judged"] - line["content/cached"] for line in lines)
    assert "could not be judged and are left out" in caplog.text
    record = json.loads((tmp_path / "run" / "evaluation" / "after.json").read_text())
    assert record["figures"]["content/judged"] > 0
    # What was judged is in the record of the episode, with the reason.
    scores = [json.loads(p.read_text()) for p in (tmp_path / "run" / "evaluation").rglob("scores.json")]
    reasons = [row["content"]["details"]["reason"] for row in scores if "content" in row]
    assert any(reason.endswith("Bearer [key]") for reason in reasons)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    leaks = [path for path in files if KEY.encode() in path.read_bytes()]
    assert leaks == []
    assert KEY not in screen.getvalue() + caplog.text
    # The judge may have moved when the run goes on; another model would be another run.
    moved = load_config(tmp_path / "run.yaml", ["rewards.content.judge.base_url=http://localhost:1/v1"])
    check_resumed(moved, tmp_path / "run" / "config.yaml")
    with pytest.raises(ValueError, match=r"resume: rewards\.content was"):
        check_resumed(
            load_config(tmp_path / "run.yaml", ["rewards.content.judge.model=another"]),
            tmp_path / "run" / "config.yaml",
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["rewards.content.judge.base_url=http://127.0.0.1:9/v1"], "judge: http://127.0.0.1:9/v1 cannot be reached"),
        (["rewards.content.judge.key_variable=NOT_SET_ANYWHERE"], "environment variable NOT_SET_ANYWHERE is not set"),
        (["rewards.content.judge.api_key=sk-oops"], "judge: unknown option `api_key`"),
        (["rewards.content.agent=asr"], "`agent: asr` needs a model"),
    ],
)
def test_what_is_wrong_with_a_judge_is_one_line_before_the_model_is_loaded(
    options, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("rlhf_duplex.cluster.roles.load_bundle", None)  # would fail, were it called
    with JudgeServer() as server:
        base = [f"run_dir={tmp_path}/run", f"rewards.content.judge.base_url={server.base_url}"]
        assert main(["train", *base, f"rewards.content.judge.model={MODEL}", *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert "sk-oops" not in error
    assert not (tmp_path / "run").exists()
