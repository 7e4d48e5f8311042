"""`rlhf-duplex warmstart`: pairs and a checkpoint in, a run folder with a better checkpoint and a report out."""

import gc
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.console import Console
from transformers import TrainerCallback

from envs.dialogues import UserSides
from envs.errors import InputError
from envs.segments import Segment, read_manifest
from envs.speech import SpeechDetector, make_detector
from envs.vector import DuplexDialogueVectorEnv
from rewards.aggregate import RewardFunction, RewardSpec
from rlhf_duplex.checkpoint import last_checkpoint
from rlhf_duplex.config_files import check_resumed
from rlhf_duplex.data.codes import open_cache
from rlhf_duplex.data.pair import Pair, read_pairs, stream_format
from rlhf_duplex.evaluation.metrics import format_table, read_results, reward_options
from rlhf_duplex.evaluation.suite import evaluate_policy
from rlhf_duplex.held_out import overlap_line, pair_stretches, trained_on
from rlhf_duplex.inputs import NANO_DATA, check_machine, first_of_each, load_segments
from rlhf_duplex.learner import NonFiniteError
from rlhf_duplex.policy.bundle import Bundle, load_bundle
from rlhf_duplex.policy.lora import add_lora, export_moshi_lora
from rlhf_duplex.policy.moshi import MoshiPolicy
from rlhf_duplex.policy.prompt import check_prompt, make_prompt
from rlhf_duplex.policy.sampling import Sampling
from rlhf_duplex.report.build import build_report
from rlhf_duplex.run_folder import claimed, make_console, prepare_run_dir, progress, stop_requests
from rlhf_duplex.tracking import MetricsLog, flat, read_metrics
from rlhf_duplex.warmstart.config import DECIDES_NUMBERS, MAY_CHANGE, WarmstartConfig
from rlhf_duplex.warmstart.reference import read_references, reference_key, score_pairs, write_references
from rlhf_duplex.warmstart.trainer import PairDataset, PreferenceTrainer


class Suite:
    """The held-out segments that the axes are measured on, or none (`evaluation.segments: null`)."""

    def __init__(self, config: WarmstartConfig) -> None:
        self.config = config
        self.segments: list[Segment] = []
        self.trained = 0  # how many of them pairs are of that are trained on
        self.recorded: list[Segment] = []  # whose agents' words are held to be words
        self.notes: list[str] = []  # what is odd about them, though they can be used
        if config.evaluation.segments is not None:
            self.detector: SpeechDetector = make_detector(config.detector.name, **config.detector.options)
            self.reward_function = RewardFunction(
                {name: RewardSpec.from_config(options) for name, options in config.rewards.items()}
            )
            segments = load_segments(config.evaluation.segments, "heldout", self.detector, self.notes, config.resume)
            self.segments = first_of_each(segments, config.evaluation.limit)
            self.reward_function.prepare(self.segments)
            self.recorded = list(self.segments)
            if config.evaluation.segments == "nano":  # the words that `train` on nano's segments holds to be words
                self.recorded += read_manifest(NANO_DATA / "train" / "segments.jsonl")

    def play(self, name: str, bundle: Bundle, run_dir: Path, step: int, console: Console) -> dict[str, Any] | None:
        """Write `evaluation/NAME.json` and its episodes; None where there is no suite."""
        if not self.segments:
            return None
        config, evaluation = self.config, self.config.evaluation
        codec = bundle.codec
        store = open_cache(config.codes_cache, codec)
        users = UserSides(codec, self.detector, evaluation.lead_in, store=store)
        env = DuplexDialogueVectorEnv(self.segments, codec, self.detector, user_sides=users)
        frames = sum(s.duration + evaluation.lead_in for s in self.segments) * evaluation.samples * codec.frame_rate
        extra = {
            "checkpoint": config.checkpoint,
            "update": step,
            "lead_in_seconds": evaluation.lead_in,
            "on_training_segments": self.trained == len(self.segments),
            "segments_trained_on": self.trained,
            "rewards": reward_options(config.rewards),
        }
        with progress(console, f"evaluation {name}", frames) as advance:
            return evaluate_policy(
                run_dir,
                name,
                MoshiPolicy(bundle.lm, Sampling(**vars(config.sampling)), make_prompt(bundle, config.prompt)),
                env,
                self.reward_function,
                self.segments,
                evaluation,
                evaluation.batch_size,
                extra,
                advance,
                recorded=self.recorded,
            )


class RunCallback(TrainerCallback):
    """Metrics to the run folder, progress to the terminal, and the ends that are not the last step."""

    def __init__(
        self, log: MetricsLog | None, console: Console, stopped: list[int], advance: Any, every: int | None
    ) -> None:
        self.log, self.console, self.stopped, self.advance, self.every = log, console, stopped, advance, every
        self.line: dict[str, float] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        if not all(bool(g.isfinite().all()) for g in gradients):
            raise NonFiniteError(
                f"a gradient is not finite in step {state.global_step + 1}: nothing of this step is saved; "
                "lower optimiser.learning_rates"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self.advance(1)
        stop = bool(self.stopped)
        if PartialState().num_processes > 1:  # a signal reaches them between different steps: they stop at the same
            stop = any(gather_object([stop]))
            if stop and not self.stopped:
                self.stopped.append(signal.SIGTERM)
        if stop:
            control.should_save = control.should_training_stop = True
        last = state.global_step >= state.max_steps or stop
        if self.every is not None:
            control.should_evaluate = last or (self.every > 0 and state.global_step % self.every == 0)
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """One line a step: the held-out pairs, where they were evaluated, are in the line of their step."""
        held_out = any(key.startswith("eval_") for key in logs)
        values = {k: float(v) for k, v in logs.items() if k != "epoch" and isinstance(v, int | float)}
        if "train_runtime" in logs or self.log is None:
            return
        if held_out:
            self.line |= values
        else:
            self.flush(state)
            self.line = {"step": state.global_step, **values}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.flush(state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.flush(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.flush(state)

    def flush(self, state: Any) -> None:
        """Write the line of the step that is done."""
        if not self.line or self.log is None:
            return
        step = int(self.line.pop("step"))
        self.log.write(step, self.line)
        if "eval_loss" in self.line or step == 1:
            self.console.print(_line(step, state.max_steps, self.line), soft_wrap=True)
        self.line = {}


def _line(step: int, steps: int, metrics: dict[str, float]) -> str:
    held_out = (
        f"  held out: accuracy {metrics['eval_rewards/accuracies']:.2f}, margin {metrics['eval_rewards/margins']:+.3f}"
        if "eval_loss" in metrics
        else ""
    )
    return (
        f"step {step}/{steps}  loss {metrics['loss']:.4f}  accuracy {metrics['rewards/accuracies']:.2f}  "
        f"margin {metrics['rewards/margins']:+.3f}{held_out}"
    )


def split_pairs(
    pairs: Sequence[Pair], limit: int = 0, at_most: Mapping[str, int] | None = None
) -> tuple[list[Pair], list[Pair]]:
    """Training pairs (`at_most` so many of a kind, spread over all of it), and held-out ones (`limit` of each kind).

    Args:
        pairs: of both splits.
        limit: the first so many held-out pairs of each kind; 0: all.
        at_most: training pairs by kind; kinds that are not named have no limit.

    Raises:
        InputError: there is no training pair, or `at_most` leaves none.
    """
    train = [pair for pair in pairs if pair.split == "train"]
    if not train:
        raise InputError("none of the pairs has split 'train': there is nothing to learn from")
    for kind, count in (at_most or {}).items():
        members = [pair for pair in train if pair.kind == kind]
        if count < len(members):
            kept = {members[i * len(members) // count].id for i in range(count)}
            train = [pair for pair in train if pair.kind != kind or pair.id in kept]
    if not train:
        raise InputError("training.at_most leaves no training pair")
    seen: dict[str, int] = {}
    held_out = []
    for pair in pairs:
        if pair.split == "heldout":
            seen[pair.kind] = seen.get(pair.kind, 0) + 1
            if not limit or seen[pair.kind] <= limit:
                held_out.append(pair)
    return train, held_out


def references_of(
    config: WarmstartConfig, run_dir: Path, bundle: Bundle, pairs: Sequence[Pair], console: Console
) -> Any:
    """`(pairs, 2)` reference log-probabilities from the cache or, where it is missing or stale, anew into it.

    Must be called while the bundle is the reference: before it is trained or given adapters that do anything.
    """
    path = Path(config.reference.cache or run_dir / "reference.safetensors")
    prompt = make_prompt(bundle, config.prompt)
    key = reference_key(bundle.lm.state_dict(), pairs, config, prompt)
    found = read_references(path, key)
    if found is None:
        if path.is_file():
            console.print(f"{path} is of other pairs, weights or options: computed anew")
        with progress(console, "reference log-probabilities", len(pairs)) as advance:
            found = score_pairs(bundle.lm, pairs, config, advance, prompt)
        try:
            write_references(path, key, found)
        except OSError as error:
            raise InputError(f"reference.cache {path} cannot be written ({error})") from error
    return found


@contextmanager
def _training(
    config: WarmstartConfig, run_dir: Path, console: Console, done: int, steps: int, held_out: bool
) -> Iterator[Any]:
    main = PartialState().is_main_process
    log = MetricsLog(run_dir, config.trackers, flat(config), done) if main else None
    try:
        with stop_requests() as stopped, progress(console, "warm start", steps - done) as advance:
            every = config.evaluation.every if held_out else None
            yield RunCallback(log, console, stopped, advance, every), stopped
    finally:
        if log is not None:
            log.close()


def warmstart(config: WarmstartConfig, console: Console | None = None) -> Path:
    """A whole warm start: checks, axes before, references, training, axes after, report. Gives the run folder.

    Raises:
        InputError: what the user can fix, before the model is loaded wherever that can be known.
        NonFiniteError: a loss or gradient that is not finite; nothing of that step was saved.
    """
    # While the first process plays and scores pairs, the others wait for it: hours on a large corpus.
    patience = {} if config.device == "cpu" else {"timeout": timedelta(days=1)}
    machine = PartialState(cpu=config.device == "cpu", **patience)
    main = machine.is_main_process
    console = console or (make_console() if main else Console(quiet=True))
    with console.status("checking pairs, recordings and configuration"):
        check_machine(config)
        check_prompt(config.prompt)
        pairs = read_pairs(Path(config.pairs))
        train, held_out = split_pairs(pairs, config.evaluation.pairs, config.training.at_most)
        suite = Suite(config)
    for note in suite.notes:
        console.print(note, soft_wrap=True, markup=False)
    with claimed(config.run_dir) if main else nullcontext():
        return _warmstart(config, machine, train, held_out, suite, console)


def _warmstart(
    config: WarmstartConfig,
    machine: PartialState,
    train: Sequence[Pair],
    held_out: Sequence[Pair],
    suite: Suite,
    console: Console,
) -> Path:
    run_dir, main = Path(config.run_dir), machine.is_main_process
    if main:
        check = partial(check_resumed, parts=DECIDES_NUMBERS, free=MAY_CHANGE)
        prepare_run_dir(config, check, {"pairs": Path(config.pairs)})
    machine.wait_for_everyone()
    torch.manual_seed(config.seed)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]
    spread = machine.num_processes > 1 and machine.device.type != "cpu"
    device = str(machine.device) if spread else config.device
    bundle = load_bundle(config.checkpoint, device, dtype)
    read_pairs(Path(config.pairs), stream_format(bundle))
    suite.trained = trained_on(suite.segments, pair_stretches(train, bundle.codec.frame_rate))
    if suite.trained:
        console.print(overlap_line(suite.trained, len(suite.segments)), soft_wrap=True)
    before_path = run_dir / "evaluation" / "before.json"
    resumed = last_checkpoint(run_dir) if config.resume else None
    before: dict[str, Any] | None = None
    if config.resume and before_path.is_file():
        before = read_results(before_path)
    elif main:
        before = suite.play("before", bundle, run_dir, 0, console)
    references = None
    if config.reference.mode == "cached" and config.loss.name != "simpo":
        with machine.main_process_first():  # the others read what it wrote
            references = references_of(config, run_dir, bundle, [*train, *held_out], console)
    if config.lora.rank:
        add_lora(bundle.lm, seed=config.seed, **vars(config.lora))
    stopped, step = _train(config, run_dir, bundle, train, held_out, references, resumed, console)
    if not main:
        return run_dir
    gc.collect()  # the trainer refers to itself, and holds an optimiser as large as two models
    torch.cuda.empty_cache()
    if stopped:
        console.print(
            f"stopped after step {step}: checkpoint in {run_dir / 'checkpoints'}, report in {build_report(run_dir)}; "
            "go on with resume=true"
        )
        return run_dir
    if config.training.fsdp:
        bundle = load_bundle(str(run_dir), device, dtype)  # in memory its weights are in pieces
    elif config.lora.rank:
        lora = config.lora
        path = export_moshi_lora(
            bundle.lm.state_dict(), bundle.lm, bundle.config, lora.rank, lora.scaling, run_dir / "lora"
        )
        console.print(f"adapters for moshi.server --lora-weight {path} --config-path {path.with_name('config.json')}")
    after = suite.play("after", bundle, run_dir, step, console)
    report = build_report(run_dir)
    if before is not None and after is not None:
        console.print(format_table(before, after))
    console.print(
        f"wrote {report} and {last_checkpoint(run_dir)}; train from it with checkpoint={run_dir}", soft_wrap=True
    )
    return run_dir


def _train(
    config: WarmstartConfig,
    run_dir: Path,
    bundle: Bundle,
    train: Sequence[Pair],
    held_out: Sequence[Pair],
    references: torch.Tensor | None,
    resumed: Path | None,
    console: Console,
) -> tuple[bool, int]:
    """All steps that are left; whether a signal ended it early, and the number of the last step."""
    trainer = PreferenceTrainer(
        bundle,
        config,
        PairDataset(train, None if references is None else references[: len(train)]),
        PairDataset(held_out, None if references is None else references[len(train) :]) if held_out else None,
        run_dir,
    )
    done = int(resumed.name.removeprefix("step_")) if resumed else 0
    batches = trainer.get_train_dataloader()
    steps = config.training.epochs * -(-len(batches) // trainer.args.gradient_accumulation_steps)
    if resumed:
        console.print(f"going on from {resumed}, after {done} of {steps} steps")
    lines = read_metrics(run_dir / "metrics.jsonl")
    trainer._total_train_tokens = next(
        (int(r["num_tokens"]) for r in lines if r["update"] == done and "num_tokens" in r), 0
    )
    with _training(config, run_dir, console, done, steps, bool(held_out)) as (callback, stopped):
        trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
        return bool(stopped) and trainer.state.global_step < steps, trainer.state.global_step
