"""What `python -m experiments.benchmarks gpu` shows."""

from typing import Any

from rich.table import Table


def tables(results: dict[str, Any]) -> list[Table]:
    """For people."""
    settings = results["settings"]
    frames = Table(title=f"{results['machine']}; {settings['shapes']}, {settings['dtype']}, random weights")
    for name in ("dialogues", "ours, ms a frame", "share of copy bandwidth", "audio-s/s", "stock, ms", "audio-s/s"):
        frames.add_column(name, justify="right")
    stock = {row["batch"]: row for row in results["stock"]}
    for row in results["frames"]:
        beside = stock.get(row["batch"])
        cells = (
            ["", ""] if beside is None else [f"{beside['frame_ms']:.2f}", f"{beside['audio_seconds_per_second']:.1f}"]
        )
        frames.add_row(
            str(row["batch"]),
            f"{row['frame_ms']:.2f}",
            f"{100 * row['bandwidth_share']:.0f} %",
            f"{row['audio_seconds_per_second']:.1f}",
            *cells,
        )
    update = results["update"]
    title = f"one GRPO update, {update['episodes']} episodes, {update['audio_seconds']:.0f} s of audio"
    stages = Table(title=title)
    for name in ("stage", "seconds", "peak GB"):
        stages.add_column(name, justify="left" if name == "stage" else "right")
    for name, value in update["seconds"].items():
        peak = update["memory"][name].get("peak_gb")
        stages.add_row(name, f"{value:.2f}", "" if peak is None else f"{peak:.1f}")
    stages.add_row("all", f"{sum(update['seconds'].values()):.2f}", "")
    stages.add_row("rollout, audio-s/s", f"{update['rollout_audio_seconds_per_second']:.1f}", "")
    stages.add_row("rollout outside the policy", f"{100 * update['outside_the_policy_share']:.1f} %", "")
    stages.add_row("update, share of matrix rate", f"{100 * update['mfu']:.1f} %", "")
    for name, value in results["ceiling"].items():
        stages.add_row(name, f"{value:.0f}", "")
    if "projection" in results:
        projection = results["projection"]
        stages.add_row(f"the paper's {projection['updates']} updates, hours", f"{projection['hours']:.2f}", "")
    return [frames, stages]
