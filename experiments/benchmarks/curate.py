"""How fast curate hears, in how much memory, and against Silero run file by file.

    python -m experiments.benchmarks.curate                      # about two minutes, on nano's dialogues
    python -m experiments.benchmarks.curate --hours 100          # 100 hours simulated: the same files under many names
    python -m experiments.benchmarks.curate --from recordings/   # on recordings of one's own

Recordings are joined to files of `--minutes` each and linked under as many names as make the hours. Curate runs as a
person runs it, in a process of its own whose peak memory is measured together with that of its workers.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import soundfile

from envs.audio import AUDIO_SUFFIXES, resample

NANO_RECORDINGS = Path(__file__).parents[2] / "rlhf_duplex" / "nano_data" / "heldout"


def make_corpus(folder: Path, hours: float, minutes: float, source: Path, rate: int) -> float:
    """A folder of stereo files of `minutes` each at `rate`, the same two under many names; gives its hours."""
    folder.mkdir(parents=True)
    paths = sorted(p for p in source.rglob("*") if p.suffix in AUDIO_SUFFIXES)
    turn = itertools.cycle(paths)
    for index in range(2):
        missing = round(minutes * 60 * rate)
        with soundfile.SoundFile(str(folder / f"{index:06d}.flac"), "w", rate, channels=2) as file:
            while missing:
                audio, own = soundfile.read(str(next(turn)), dtype="float32", always_2d=True)
                taken = resample(audio[:, :2].T, own, rate).T[:missing]
                file.write(taken)
                missing -= len(taken)
    count = max(2, round(hours * 60 / minutes))
    for index in range(2, count):
        os.link(folder / f"{index % 2:06d}.flac", folder / f"{index:06d}.flac")
    return count * minutes / 60


def run_curate(corpus: Path, workers: int) -> dict[str, float]:
    """Seconds and peak memory (bytes, resident, of the process and all its children) of one run of the command."""
    out = corpus.with_name(f"{corpus.name}_{workers}.jsonl")
    command = [sys.executable, "-m", "rlhf_duplex.cli", "curate", str(corpus), "--out", str(out)]
    command += ["--workers", str(workers), "--examples", "0"]
    # The dialogues of nano are short ones: what is found must not be nothing.
    command += ["--pause-min", "2", "--turn-min", "1.5", "--backchannel-min", "2", "--interruption-min", "1"]
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        peak = [0, 0]
        watcher = threading.Thread(target=_watch, args=(process, peak))
        watcher.start()
        output, _ = process.communicate()
        watcher.join()
        errors.seek(0)
        if process.returncode:
            raise RuntimeError(f"curate failed: {errors.read()}")
    (heard,) = (line for line in output.splitlines() if line.startswith("heard"))
    words = heard.split()  # heard 0.06 hours in 2.0 s, 0.027 hours/s
    return {
        "seconds": time.monotonic() - began,
        "hours_per_second": float(words[1]) / float(words[4]),
        "peak_bytes": float(peak[0]),
        "peak_process_bytes": float(peak[1]),
    }


def _watch(process: subprocess.Popen, peak: list[int]) -> None:
    """The most memory that the process and its children have had together, and that one of them has had."""
    while process.poll() is None:
        sizes = []
        try:
            parent = psutil.Process(process.pid)
            for member in [parent, *parent.children(recursive=True)]:
                sizes.append(member.memory_info().rss)
        except psutil.NoSuchProcess:
            continue
        peak[0], peak[1] = max(peak[0], sum(sizes)), max(peak[1], *sizes)
        time.sleep(0.1)


def detection(path: Path, repeats: int = 3) -> dict[str, float]:
    """Silero's own package, one channel after the other as its README does it, against curate's way: CPU seconds on
    one thread, reading and resampling included, by turns on the same file; the median of some repeats.

    CPU seconds, since what else runs on a machine would decide a ratio of wall times.

    Returns:
        `detection_vs_silero_file_by_file`, and `hours_per_cpu_second` of curate's way.
    """
    import torch
    from silero_vad import get_speech_timestamps, load_silero_vad

    from envs.speech import SileroDetector
    from envs.streaming import stream_speech

    threads = torch.get_num_threads()
    detector, model = SileroDetector(), load_silero_vad()
    torch.set_num_threads(1)
    ratios, seconds = [], []
    for _ in range(repeats + 1):
        began = time.process_time()
        audio, rate = soundfile.read(str(path), dtype="float32", always_2d=True)
        for side in resample(audio.T, rate, 16000):
            get_speech_timestamps(torch.from_numpy(side), model, sampling_rate=16000)
        stock = time.process_time() - began
        began = time.process_time()
        stream_speech([(path, [0, 1])], detector)
        seconds.append(time.process_time() - began)
        ratios.append(stock / seconds[-1])
    torch.set_num_threads(threads)
    # The first repeat warms both up.
    return {
        "detection_vs_silero_file_by_file": float(np.median(ratios[1:])),
        "hours_per_cpu_second": soundfile.info(str(path)).duration / 3600 / float(np.median(seconds[1:])),
    }


def measure(
    hours: float = 4.0, minutes: float = 10.0, workers: int = 2, source: Path | None = None, rate: int = 8000
) -> dict[str, float]:
    """Speed and memory of the command at `hours` and at a quarter of them, and of one process on short and long files.

    Returns:
        `hours_per_second` with `workers`, start of Ray included, and `hours_per_second_in_process`; of one thread
        `detection_vs_silero_file_by_file` and `hours_per_cpu_second`; `peak_gib` of all processes together (what they
        share is counted for each) and `peak_gib_at_a_quarter`; `peak_process_gib` of the largest of them;
        `one_file_gib` and `long_file_gib` of a process that hears two files of `minutes`, and two of six times as many.
    """
    source = source or NANO_RECORDINGS
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        made = make_corpus(root / "all", hours, minutes, source, rate)
        make_corpus(root / "quarter", hours / 4, minutes, source, rate)
        make_corpus(root / "one", 2 * minutes / 60, minutes, source, rate)
        make_corpus(root / "long", 12 * minutes / 60, 6 * minutes, source, rate)
        make_corpus(root / "short", 2 / 60, 1.0, source, rate)
        ratio = detection(root / "short" / "000000.flac")
        quarter, whole = run_curate(root / "quarter", workers), run_curate(root / "all", workers)
        alone, long = run_curate(root / "one", 0), run_curate(root / "long", 0)
    gib = 2**30
    return {
        "hours": made,
        "workers": float(workers),
        "hours_per_second": whole["hours_per_second"],
        "hours_per_second_in_process": long["hours_per_second"],
        **ratio,
        "peak_gib": whole["peak_bytes"] / gib,
        "peak_gib_at_a_quarter": quarter["peak_bytes"] / gib,
        "peak_process_gib": whole["peak_process_bytes"] / gib,
        "one_file_gib": alone["peak_bytes"] / gib,
        "long_file_gib": long["peak_bytes"] / gib,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=4.0)
    parser.add_argument("--minutes", type=float, default=10.0, help="of each file")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--from", dest="source", type=Path, help="folder of two-channel recordings")
    parser.add_argument("--rate", type=int, default=8000, help="Hz of the files (nano speaks at 8 kHz)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = measure(options.hours, options.minutes, options.workers, options.source, options.rate)
    for name, value in result.items():
        print(f"{name:36} {value:.4g}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
