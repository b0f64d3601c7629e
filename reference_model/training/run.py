"""The course of a run: what is written before, while and after it trains, and how it resumes."""

import json
import math
import sys
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from reference_model.checkpoints.checkpoint import CONFIG, start_checkpoint
from reference_model.configs import build, read_yaml, to_yaml
from reference_model.files import InputError, written_whole
from reference_model.model.loss import Losses
from reference_model.scoring.evaluator import Evaluator
from reference_model.scoring.metris_predictor import MetrisPredictor
from reference_model.training import distributed as scale
from reference_model.training import state
from reference_model.training.best import BestWeights, metric_of
from reference_model.training.config import TrainConfig, resources
from reference_model.training.folder import copy_generated_note
from reference_model.training.journal import LOG, Log, Meter, peak_memory, write_note
from reference_model.training.learner import Learner, StepReport
from reference_model.training.training_data import TrainingData


def seed_process(*numbers: int) -> None:
    """Give this process random numbers of its own, from a few small numbers."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 1_000_003 + number + 1) % 2**63
    torch.manual_seed(mixed)


@dataclass
class Run:
    """How far a run is, what it keeps, and the folder where it does."""

    config: TrainConfig
    accelerator: Accelerator
    learner: Learner
    predictor: MetrisPredictor
    """Scores val."""
    data: TrainingData
    steps: int
    """Of the whole run."""
    step: int = 0
    """Steps that are done."""
    skipped: int = 0
    """Steps among them that were left out."""
    unread: list[StepReport] = field(default_factory=list)
    """Steps whose losses are still on the device alone."""
    evaluation_due: bool = False
    """Whether the last step asks for an evaluation that was put off by SIGTERM."""
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.out = self.config.out
        self.loader = self.data.loader
        self.best = BestWeights(self.out, self.config.checkpointing.keep_best)

    @property
    def first_process(self) -> bool:
        """Tell whether this process is the one that writes."""
        return self.accelerator.is_main_process

    @property
    def seconds(self) -> float:
        """Time that the run took, all its sessions together."""
        return time.monotonic() - self.started

    @property
    def log_path(self) -> Path | None:
        """The log, where this process writes one."""
        return self.out / LOG if self.first_process and not self.config.dry_run else None

    def begin(self) -> None:
        """Write what is known before the first step: config, tokenizer, versions, hardware, counts."""
        if self.config.dry_run:
            return
        scale.on_first(self.accelerator, self._note)
        if self.config.logging.tracker != "none":
            flat = {name: str(value) for name, value in flattened(asdict(self.config)).items()}
            with redirect_stdout(sys.stderr):  # trackio prints where it goes
                self.accelerator.init_trackers("metris", config=flat)

    def _note(self) -> None:
        if not self.step:
            written = replace(self.config, json=False)  # it may be given as --config again
            start_checkpoint(self.out, to_yaml(written), self.predictor.tokenizer)
            copy_generated_note(self.config.data.root, self.out)
        parameters = list(self.learner.bare.parameters())
        facts = {
            "processes": self.accelerator.num_processes,
            "data": {
                "sentences": self.loader.sentences,
                "images": self.loader.images,
                "val": self.data.val.count,
            },
            "parameters": sum(p.numel() for p in parameters),
            "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
            "steps": self.steps,
            "resources": {name: str(value) for name, value in resources(self.config).items()},
        }
        write_note(self.out, facts, done=self.step, device=self.accelerator.device)
        (self.out / state.STATES).mkdir(exist_ok=True)

    def save(self) -> None:
        """Save a state; all processes must call it."""
        scale.take_from_first(self.learner.bare)
        tensors, rngs = self.learner.tensors(), gather_object([state.random_state()])
        scaler = self.accelerator.scaler

        def write() -> None:
            facts = {
                "step": self.step,
                "data": self.data.fingerprint,
                "workers": self.config.data.workers,
                "epoch": self.loader.epoch,
                "position": self.loader.position,
                "sentences": self.loader.sentences,
                "seconds": self.seconds,
                "skipped": self.skipped,
                "best": self.best.ranked,
                "best_scores": self.best.scores,
                "evaluation_due": self.evaluation_due,
                "scaler": None if scaler is None else scaler.state_dict(),
            }
            state.save_state(self.out, tensors, facts, rngs, keep=self.config.checkpointing.keep_last)

        scale.on_first(self.accelerator, write)

    def seed_processes(self) -> None:
        """Give each process but the first its own random numbers; the first goes on as if it were alone."""
        if rank := self.accelerator.process_index:
            seed_process(self.config.seed, rank)

    def resume(self) -> None:
        """Resume from the newest sound state of the folder, or begin where there is none.

        Raises:
            InputError: The folder holds a run with other settings or other data.
        """
        # One process chooses: machines may see a shared folder differently.
        newest = scale.on_first(self.accelerator, lambda: state.newest_state(self.out))
        if self.first_process:
            state.clear_leftovers(self.out)
        rank = self.accelerator.process_index
        if newest is None:
            self._say(f"{self.out}: was interrupted before it saved a state, begins again")
            self.seed_processes()
            return
        found = state.load_state(newest)
        self._refuse_another(found)
        facts = found.facts
        self.learner.restore(found.tensors, facts["scaler"])
        self.step, self.skipped = facts["step"], facts["skipped"]
        self.evaluation_due = facts.get("evaluation_due", False)
        self.best.ranked, self.best.scores = [(s, n) for s, n in facts["best"]], facts["best_scores"]
        kept = scale.on_first(self.accelerator, lambda: self.best.drop_overwritten(self._say))
        self.best.ranked = kept
        self.started = time.monotonic() - facts["seconds"]
        self.loader.epoch, self.loader.position = facts["epoch"], facts["position"]
        if len(found.rngs) == self.accelerator.num_processes:
            state.set_random_state(found.rngs[rank])
        else:
            now = self.accelerator.num_processes
            self._say(f"{len(found.rngs)} processes before, now {now}: the same order, other dropout")
            seed_process(self.config.seed, rank, self.step)
        if self.data.val.listed is None and self.loader.position:
            before = (len(found.rngs), facts["workers"])
            if before != (self.accelerator.num_processes, self.config.data.workers):
                self._say(
                    "processes or data.workers changed, and with them the order of shards: some sentences of "
                    "this epoch come twice, others not"
                )
        self._say(f"{self.out}: goes on from step {self.step} of {self.steps} ({found.folder.name})")

    def leave(self) -> None:
        """End the process in good order, its state being saved."""
        saved = f"saved step {self.step} of {self.steps}; the same command goes on there"
        self._say(f"metris: SIGTERM: {'a dry run saves nothing' if self.config.dry_run else saved}")
        self.accelerator.end_training()
        raise SystemExit(0)

    def read_losses(self) -> tuple[Losses, float]:
        """Wait for the device and give losses and gradient norm of the latest step.

        Raises:
            InputError: One of the steps since the last reading was not finite, and may not be left out.
        """
        rows = torch.stack([torch.stack([*report.losses, report.norm]) for report in self.unread]).tolist()
        for report, row in zip(self.unread, rows):
            losses, norm = Losses(*row[:-1]), row[-1]
            if not (math.isfinite(losses.total) and (math.isfinite(norm) or self.learner.settling)):
                self._leave_out(report, losses, norm)
        self.unread.clear()
        return losses, norm

    def _leave_out(self, report: StepReport, losses: Losses, norm: float) -> None:
        """Write down the sentences of a step whose loss or gradient is not finite; leave it out if allowed.

        Raises:
            InputError: It is not.
        """
        step, limit = report.step, self.config.checkpointing.skip_nonfinite
        records = gather_object(report.sentences)
        values = {name: str(value) for name, value in losses._asdict().items()} | {"gradient_norm": str(norm)}
        content = json.dumps({"step": step, **values, "sentences": records}, indent=2) + "\n"
        what = f"loss is {values['total']}" if not math.isfinite(losses.total) else f"gradient norm is {norm}"
        line = f"step {step}: {what} on sentences {[r['sent_id'] for r in records]}"
        if not self.config.dry_run:
            dump = self.out / f"nonfinite-step-{step:08d}.json"
            scale.on_first(self.accelerator, lambda: _write(dump, content))
            line += f", see {dump}"
        if self.skipped >= limit:
            after = f" after {self.skipped} steps left out (skip_nonfinite)" if self.skipped else ""
            raise InputError(
                f"{line}{after}; raise checkpointing.skip_nonfinite to go on without it, or begin another "
                "--out, with a lower optim.learning_rate"
            )
        self.skipped += 1
        self._say(f"{line}, left out ({self.skipped} of at most {limit})")

    def evaluate(self, log: Log) -> None:
        """Score val, each process its share, keep the weights if they are among the best, and log it."""
        predictor = replace(self.predictor, model=self.learner.kept())
        scores = Evaluator(on_error=predictor.on_error).score(predictor, self.data.val, title="val")
        self.learner.bare.train()  # but for its frozen parts, which a predictor does not know
        name = metric_of(scores)
        self._say(f"step {self.step}: val {name} {scores[name]:.4f}, oIoU {scores['oIoU']:.4f}")
        self.best.rank(scores, self.step)
        config = to_yaml(self.config)
        write = lambda: self.best.write(predictor.model, predictor.tokenizer, config, self.step)
        scale.on_first(self.accelerator, write)
        self.evaluation_due = False
        log.write(step=self.step, seconds=self.seconds, val=scores)
        self.accelerator.log({f"val/{name}": value for name, value in scores.items()}, step=self.step)

    def finish(self) -> Path:
        """Print the result and remove the states, which nothing is left to do with."""
        if self.first_process:
            state.finish(self.out)
            scores, name = self.best.scores, metric_of(self.best.scores)
            result = {"checkpoint": str(self.out), "steps": self.steps, "val": scores}
            in_short = f"checkpoint: {self.out} (val {name} {scores[name]:.4f})"
            print(json.dumps(result) if self.config.json else in_short)
        self.accelerator.end_training()
        return self.out

    def estimate(self, meter: Meter) -> Path:
        """Print what the whole run would take, from the steps of a dry run and a few sentences of val."""
        # Each process takes every num_processes-th image.
        count = sum(1 for _ in self.data.val)
        some = list(islice(self.data.val, self.predictor.batch_size * self.accelerator.num_processes))
        began = time.monotonic()
        Evaluator(on_error=self.predictor.on_error).score(
            replace(self.predictor, model=self.learner.kept()), some, title="val"
        )
        scoring = (time.monotonic() - began) * count / len(some)
        every = self.config.evaluate_every * self.loader.steps
        evaluations = -(-self.steps // every) if every else 1
        step = meter.step_seconds
        weights = sum(tensor.numel() * tensor.element_size() for tensor in self.learner.tensors().values())
        found = {
            "steps": self.steps,
            "seconds_a_step": round(step, 3),
            "evaluations": evaluations,
            "seconds_an_evaluation": round(scoring, 1),
            "hours": round((self.steps * step + evaluations * scoring) / 3600, 2),
            "memory_MiB": peak_memory(self.accelerator.device),
            "state_MiB": weights // 2**20,
            "processes": self.accelerator.num_processes,
        }
        if self.first_process:
            print(json.dumps(found) if self.config.json else _laid_out(found))
        self.accelerator.end_training()
        return self.out

    def _refuse_another(self, found: state.State) -> None:
        path = self.out / CONFIG
        # What is newer than the run had its default then.
        before = build(TrainConfig, read_yaml(path, TrainConfig), source=str(path))
        if differing := differences(before, self.config):
            raise InputError(
                f"{self.out}: holds an unfinished run with {', '.join(differing)}; choose another --out"
            )
        if (then := found.facts["sentences"]) != (now := self.loader.sentences):
            raise InputError(
                f"{self.out}: was trained on {then} sentences, now there are {now}; restore the data"
            )
        if found.facts["data"] != self.data.fingerprint:
            raise InputError(
                f"{self.out}: was trained on other sentences than {self.config.data.root} holds now, or "
                "scored on others; restore the data"
            )

    def _say(self, line: str) -> None:
        if self.first_process:
            tqdm.write(line, sys.stderr)


def differences(held: TrainConfig, asked: TrainConfig) -> list[str]:
    """Name the settings in which two configs differ, of those that the result depends on.

    Places, processes and memory do not count.
    """
    aside = {*resources(asked), "data.root", "data.workers", "data.on_error"}
    one, other = (flattened(asdict(config)) for config in (held, asked))
    return [
        f"{key}={one.get(key)} (asked for {other.get(key)})"
        for key in {**one, **other}
        if key not in aside and str(one.get(key)) != str(other.get(key))
    ]


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Name the values of nested mappings by dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping) and value
        flat |= flattened(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def _write(place: Path, content: str) -> None:
    with written_whole(place) as path:
        path.write_text(content)


def _laid_out(found: Mapping[str, Any]) -> str:
    return "\n".join(f"{name.replace('_', ' '):24}{value:>12}" for name, value in found.items())
