"""rewards/README.md followed word for word in an empty folder: its files written, its commands run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.timeout(1800)  # two runs of the command line
def test_the_tutorial_trains(tmp_path):
    blocks = FENCE.findall((ROOT / "rewards" / "README.md").read_text(encoding="utf-8"))
    programs = Path(sys.executable).parent  # where pip has put rlhf-duplex, beside python
    assert (programs / "rlhf-duplex").exists(), "install the package: pip install -e ."
    environment = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    outputs = []
    for language, name, text in blocks:
        if name:
            (tmp_path / name).write_text(text, encoding="utf-8")
        elif language == "sh":
            for command in text.strip().splitlines():
                done = subprocess.run(
                    command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=800
                )
                assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
                outputs.append(done.stdout)
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith("__")) == [
        "compare.py",
        "runs",
        "speech_rate.py",
        "speech_rate.yaml",
        "sweep.yaml",
    ]
    rows = dict(line.split(" ", 1) for line in outputs[-2].strip().splitlines())
    assert set(rows) == {"with", "without"}
    assert all("speech_rate" in row for row in rows.values())
    for run, weight in (("with", 1.0), ("without", 0.0)):
        lines = [json.loads(line) for line in (tmp_path / "runs" / run / "metrics.jsonl").read_text().splitlines()]
        assert [line["update"] for line in lines] == [1, 2]
        assert any(line["optimiser_steps"] > 0 for line in lines)
        shares = [line["advantage_share/speech_rate"] for line in lines if "advantage_share/speech_rate" in line]
        assert shares
        assert (max(shares) > 0) == (weight > 0)
        assert (tmp_path / "runs" / run / "report.html").is_file()
    # The sweep: six lines, both weights run, and what they gave in the table and on the page.
    assert len((tmp_path / "sweep.yaml").read_text().strip().splitlines()) == 6
    assert "speech_rate.weight 2, seed 0: done" in outputs[-1]
    table = pd.read_csv(tmp_path / "runs" / "sweep" / "table.csv")
    measured = table[(table["axis"] == "speech_rate") & (table["metric"] == "reward")]
    assert measured["rewards.speech_rate.weight"].tolist() == [0.0, 2.0]
    page = (tmp_path / "runs" / "sweep" / "report.html").read_text(encoding="utf-8")
    assert "Against rewards.speech_rate.weight" in page
