"""The folder of a run: what is written before, while and after it trains, and how it is taken up again."""

import fcntl
import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from reference_model.checkpoints.checkpoint import (
    CONFIG,
    GENERATED,
    WEIGHTS,
    save_weights,
    start_checkpoint,
    step_of_weights,
)
from reference_model.configs import build, read_yaml, to_yaml
from reference_model.data.collate import Batch
from reference_model.data.convert import generated_note
from reference_model.data.readers.reader import Stream
from reference_model.data.records import Record
from reference_model.data.sampler import ImageGroupedSampler
from reference_model.data.streaming import ShardedLoader
from reference_model.files import InputError, refuse_unwritable, written_whole
from reference_model.model.loss import Losses
from reference_model.model.metris import METRIS
from reference_model.scoring.evaluator import Evaluator
from reference_model.scoring.metris_predictor import MetrisPredictor
from reference_model.training import distributed as scale
from reference_model.training import state
from reference_model.training.config import RESOURCES, TrainConfig
from reference_model.training.journal import LOG, Meter, peak_memory, write_note
from reference_model.training.learner import Learner

BEST = "best"
_LOCK = ".lock"


@contextmanager
def claimed(config: TrainConfig, accelerator: Accelerator) -> Iterator[bool]:
    """Keep other commands out of a run's folder while this one is at it.

    Yields:
        Whether an unfinished run is there to go on with.

    Raises:
        InputError: A finished run is there, or another process is at it.
    """
    if config.dry_run:
        yield False
        return
    file, fresh = None, [folder for folder in (config.out, *config.out.parents) if not folder.exists()]

    def claim() -> bool:
        nonlocal file
        unfinished = (config.out / state.STATES).is_dir()
        if (config.out / WEIGHTS).exists() and not unfinished:
            state.finish(config.out)  # it may have been killed at that
            raise InputError(
                f"{config.out}: holds the weights of a run already; choose another --out or remove it"
            )
        refuse_unwritable(config.out / _LOCK)
        config.out.mkdir(parents=True, exist_ok=True)
        file = (config.out / _LOCK).open("a")
        try:
            # A lock of this process alone: those that load data would hold a flock a while after its death.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            file = None  # the other's, which it removes itself
            raise InputError(f"{config.out}: another metris train is at it; wait for that one") from error
        return unfinished

    try:
        yield scale.on_first(accelerator, claim)
    finally:
        if file is not None:
            Path(file.name).unlink(missing_ok=True)
            file.close()
            with suppress(OSError):  # what is not empty stays
                for folder in fresh:
                    folder.rmdir()


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
    sampler: ImageGroupedSampler | ShardedLoader
    """Owns the place in the data."""
    predictor: MetrisPredictor
    val: Sequence[Record] | Stream
    data: str
    """What the sentences are, in short: a hash."""
    steps: int
    """Of the whole run."""
    step: int = 0
    """Steps that are done."""
    skipped: int = 0
    """Steps among them that were left out."""
    best: list[tuple[float, int]] = field(default_factory=list)
    """Score and step of the best evaluations, best first."""
    best_scores: dict[str, float] = field(default_factory=dict)
    """Of the best one."""
    evaluation_due: bool = False
    """Whether the last step asks for an evaluation that was put off by SIGTERM."""
    started: float = field(default_factory=time.monotonic)

    @property
    def out(self) -> Path:
        """The folder."""
        return self.config.out

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
        if self.config.tracker != "none":
            flat = {name: str(value) for name, value in flattened(asdict(self.config)).items()}
            with redirect_stdout(sys.stderr):  # trackio prints where it goes
                self.accelerator.init_trackers("metris", config=flat)

    def _note(self) -> None:
        if not self.step:
            written = replace(self.config, json=False)  # it may be given as --config again
            start_checkpoint(self.out, to_yaml(written), self.predictor.tokenizer)
            if (note := generated_note(self.config.data.root)) is not None:
                with written_whole(self.out / GENERATED) as path:
                    shutil.copyfile(note, path)
        parameters = list(self.learner.bare.parameters())
        facts = {
            "processes": self.accelerator.num_processes,
            "data": {
                "sentences": self.sampler.sentences,
                "images": self.sampler.images,
                "val": self._val_sentences,
            },
            "parameters": sum(p.numel() for p in parameters),
            "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
            "steps": self.steps,
            "resources": {name: str(getattr(self.config, name)) for name in RESOURCES},
        }
        write_note(self.out, facts, done=self.step, device=self.accelerator.device)
        (self.out / state.STATES).mkdir(exist_ok=True)

    @property
    def _val_sentences(self) -> int | None:
        if isinstance(self.val, Sequence):
            return len(self.val)
        return self.val.reader.splits.get(self.val.split)  # as the index of shards says

    def save(self) -> None:
        """Save a state; all processes must call it."""
        scale.take_from_first(self.learner.bare)
        tensors, rngs = self.learner.tensors(), gather_object([state.random_state()])
        scaler = self.accelerator.scaler

        def write() -> None:
            facts = {
                "step": self.step,
                "data": self.data,
                "workers": self.config.data.workers,
                "epoch": self.sampler.epoch,
                "position": self.sampler.position,
                "sentences": self.sampler.sentences,
                "seconds": self.seconds,
                "skipped": self.skipped,
                "best": self.best,
                "best_scores": self.best_scores,
                "evaluation_due": self.evaluation_due,
                "scaler": None if scaler is None else scaler.state_dict(),
            }
            state.save_state(self.out, tensors, facts, rngs, keep=self.config.keep_last)

        scale.on_first(self.accelerator, write)

    def go_on(self) -> None:
        """Take up the newest sound state of the folder, or begin where there is none.

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
            if rank:
                seed_process(self.config.seed, rank)
            return
        found = state.load_state(newest)
        self._refuse_another(found)
        facts = found.facts
        self.learner.restore(found.tensors, facts["scaler"])
        self.step, self.skipped = facts["step"], facts["skipped"]
        self.evaluation_due = facts.get("evaluation_due", False)
        self.best, self.best_scores = [(s, n) for s, n in facts["best"]], facts["best_scores"]
        self.best = scale.on_first(self.accelerator, self._best_that_are_kept)
        self.started = time.monotonic() - facts["seconds"]
        self.sampler.epoch, self.sampler.position = facts["epoch"], facts["position"]
        if len(found.rngs) == self.accelerator.num_processes:
            state.set_random_state(found.rngs[rank])
        else:
            now = self.accelerator.num_processes
            self._say(f"{len(found.rngs)} processes before, now {now}: the same order, other dropout")
            seed_process(self.config.seed, rank, self.step)
        if isinstance(self.sampler, ShardedLoader) and self.sampler.position:
            before = (len(found.rngs), facts["workers"])
            if before != (self.accelerator.num_processes, self.config.data.workers):
                self._say(
                    "processes or data.workers changed, and with them the order of shards: some sentences of "
                    "this epoch come twice, others not"
                )
        self._say(f"{self.out}: goes on from step {self.step} of {self.steps} ({found.folder.name})")

    def _best_that_are_kept(self) -> list[tuple[float, int]]:
        """Leave out evaluations whose weights another one replaced, after which the run was killed: no state
        knows of that one."""
        here = step_of_weights(self.out)
        if not self.best or here == self.best[0][1]:
            return self.best
        kept = [
            entry for entry in self.best if entry[1] == here or (self._folder(entry[1]) / WEIGHTS).exists()
        ]
        if kept and kept[0][1] != here:
            with written_whole(self.out / WEIGHTS) as path:
                shutil.copyfile(self._folder(kept[0][1]) / WEIGHTS, path)
        of = f"those of step {kept[0][1]}" if kept else "replaced by the next evaluation"
        self._say(
            f"{self.out}: the weights there are not those of step {self.best[0][1]}, the best; are {of}"
        )
        return kept

    def leave(self) -> None:
        """End the process in good order, its state being saved."""
        saved = f"saved step {self.step} of {self.steps}; the same command goes on there"
        self._say(f"metris: SIGTERM: {'a dry run saves nothing' if self.config.dry_run else saved}")
        self.accelerator.end_training()
        raise SystemExit(0)

    def leave_out(self, step: int, losses: Losses, norm: float, micro_batches: Sequence[Batch]) -> None:
        """Write down the sentences of a step whose loss or gradient is not finite; leave it out if allowed.

        Raises:
            InputError: It is not.
        """
        records = gather_object([_identity(record) for batch in micro_batches for record in batch.records])
        shown = {name: str(value) for name, value in losses._asdict().items()} | {"gradient_norm": str(norm)}
        content = json.dumps({"step": step, **shown, "sentences": records}, indent=2) + "\n"
        what = f"loss is {shown['total']}" if not math.isfinite(losses.total) else f"gradient norm is {norm}"
        line = f"step {step}: {what} on sentences {[r['sent_id'] for r in records]}"
        if not self.config.dry_run:
            dump = self.out / f"nonfinite-step-{step:08d}.json"
            scale.on_first(self.accelerator, lambda: _written(dump, content))
            line += f", see {dump}"
        if self.skipped >= self.config.skip_nonfinite:
            limit = f" after {self.skipped} steps left out (skip_nonfinite)" if self.skipped else ""
            raise InputError(
                f"{line}{limit}; raise skip_nonfinite to go on without it, or begin another --out, with a "
                "lower learning_rate"
            )
        self.skipped += 1
        self._say(f"{line}, left out ({self.skipped} of at most {self.config.skip_nonfinite})")

    def evaluate(self) -> dict[str, float]:
        """Score val, each process its share, and keep the weights if they are among the best."""
        predictor = replace(self.predictor, model=self.learner.kept())
        scores = Evaluator(on_error=self.predictor.on_error).score(predictor, self.val, title="val")
        self.learner.bare.train()  # but for its frozen parts, which a predictor does not know
        best_by = "gIoU" if "gIoU" in scores else "mIoU"  # the former where some have no target
        self._say(f"step {self.step}: val {best_by} {scores[best_by]:.4f}, oIoU {scores['oIoU']:.4f}")
        ranked = sorted([*self.best, (scores[best_by], self.step)], key=lambda entry: (-entry[0], entry[1]))
        self.best = ranked[: self.config.keep_best]
        if self.best[0][1] == self.step:
            self.best_scores = scores
        scale.on_first(self.accelerator, lambda: self._keep(predictor.model))
        return scores

    def finish(self) -> Path:
        """Print the result and remove the states, which nothing is left to do with."""
        if self.first_process:
            state.finish(self.out)
            result = {"checkpoint": str(self.out), "steps": self.steps, "val": self.best_scores}
            best_by = "gIoU" if "gIoU" in self.best_scores else "mIoU"
            print(
                json.dumps(result)
                if self.config.json
                else f"checkpoint: {self.out} (val {best_by} {self.best_scores[best_by]:.4f})"
            )
        self.accelerator.end_training()
        return self.out

    def foretell(self, meter: Meter) -> Path:
        """Print what the whole run would take, from the steps of a dry run and a few sentences of val."""
        # Each process takes every so manieth image.
        count = sum(1 for _ in self.val)
        some = list(islice(self.val, self.predictor.batch_size * self.accelerator.num_processes))
        began = time.monotonic()
        Evaluator(on_error=self.predictor.on_error).score(
            replace(self.predictor, model=self.learner.kept()), some, title="val"
        )
        scoring = (time.monotonic() - began) * count / len(some)
        every = self.config.evaluate_every * self.sampler.steps
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

    def _keep(self, model: METRIS) -> None:
        """Write the weights of the best evaluation, and of each of the best as a checkpoint of its own."""
        if self.best[0][1] == self.step:
            save_weights(self.out, model, step=self.step)
        if self.config.keep_best == 1:
            return
        folders, mine = [self._folder(step) for _, step in self.best], self._folder(self.step)
        if mine in folders:
            start_checkpoint(mine, to_yaml(self.config), self.predictor.tokenizer)
            save_weights(mine, model, step=self.step)
        for folder in set((self.out / BEST).glob("step-*")) - set(folders):
            shutil.rmtree(folder)

    def _folder(self, step: int) -> Path:
        return self.out / BEST / f"step-{step:08d}"

    def _refuse_another(self, found: state.State) -> None:
        path = self.out / CONFIG
        # What is newer than the run had its default then.
        before = build(TrainConfig, read_yaml(path, TrainConfig), source=str(path))
        if differing := differences(before, self.config):
            raise InputError(
                f"{self.out}: holds an unfinished run with {', '.join(differing)}; choose another --out"
            )
        if (then := found.facts["sentences"]) != (now := self.sampler.sentences):
            raise InputError(
                f"{self.out}: was trained on {then} sentences, now there are {now}; restore the data"
            )
        if found.facts["data"] != self.data:
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
    aside = (*RESOURCES, "data.root", "data.workers", "data.on_error")
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


def digest(*splits: Iterable[Record]) -> str:
    """Hash the ids and sentences of splits, in their order."""
    found = hashlib.sha256()
    for records in splits:
        for record in records:
            found.update(f"{record.sent_id} {record.image_id} {record.expression}\n".encode())
        found.update(b"\0")
    return found.hexdigest()


def _written(place: Path, content: str) -> None:
    with written_whole(place) as path:
        path.write_text(content)


def _identity(record: Record) -> dict[str, Any]:
    return {"sent_id": record.sent_id, "image_id": record.image_id, "expression": record.expression}


def _laid_out(found: Mapping[str, Any]) -> str:
    return "\n".join(f"{name.replace('_', ' '):24}{value:>12}" for name, value in found.items())
