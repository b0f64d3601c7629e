"""The folder of a run: what is written before, while and after it trains, and how it is taken up again."""

import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from reference_model.configs import build, read_yaml, to_yaml
from reference_model.data.collate import Batch
from reference_model.data.convert import generated_note
from reference_model.data.records import Record
from reference_model.data.streaming import ShardedLoader
from reference_model.files import InputError, written_whole
from reference_model.model.checkpoint import CONFIG, GENERATED, save_weights, start_checkpoint
from reference_model.model.loss import Losses
from reference_model.model.metris import METRIS
from reference_model.scoring.evaluate import Stream
from reference_model.scoring.evaluator import Evaluator
from reference_model.scoring.metris_predictor import MetrisPredictor
from reference_model.training import scale, state
from reference_model.training.config import RESOURCES, TrainConfig
from reference_model.training.journal import LOG, Meter, peak_memory, write_note
from reference_model.training.learner import Learner
from reference_model.training.sampler import ImageGroupedSampler

BEST = "best"


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
        if self.first_process:
            if not self.step:
                start_checkpoint(self.out, to_yaml(self.config), self.predictor.tokenizer)
                if (note := generated_note(self.config.data.root)) is not None:
                    with written_whole(self.out / GENERATED) as path:
                        shutil.copyfile(note, path)
            parameters = list(self.learner.bare.parameters())
            facts = {
                "processes": self.accelerator.num_processes,
                "data": {
                    "sentences": self.sampler.sentences,
                    "images": self.sampler.images,
                    "val": len(self.val) if isinstance(self.val, Sequence) else None,
                },
                "parameters": sum(p.numel() for p in parameters),
                "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
                "steps": self.steps,
            }
            write_note(self.out, facts, done=self.step, device=self.accelerator.device)
            (self.out / state.STATES).mkdir(exist_ok=True)
        if self.config.tracker != "none":
            flat = {name: str(value) for name, value in _flat(asdict(self.config)).items()}
            self.accelerator.init_trackers("metris", config=flat)

    def save(self) -> None:
        """Save a state; all processes must call it."""
        scale.take_from_first(self.learner.bare)
        tensors, rngs = self.learner.tensors(), gather_object([state.random_state()])
        scaler = self.accelerator.scaler
        if self.first_process:
            facts = {
                "step": self.step,
                "workers": self.config.data.workers,
                "epoch": self.sampler.epoch,
                "position": self.sampler.position,
                "sentences": self.sampler.sentences,
                "seconds": self.seconds,
                "skipped": self.skipped,
                "best": self.best,
                "best_scores": self.best_scores,
                "scaler": None if scaler is None else scaler.state_dict(),
            }
            state.save_state(self.out, tensors, facts, rngs, keep=self.config.keep_last)
        self.accelerator.wait_for_everyone()

    def go_on(self) -> None:
        """Take up the newest sound state of the folder, or begin where there is none.

        Raises:
            InputError: The folder holds a run with other settings or other data.
        """
        found = state.load_state(self.out, say=self.first_process)
        self.accelerator.wait_for_everyone()
        if self.first_process:
            state.clear_leftovers(self.out)
        rank = self.accelerator.process_index
        if found is None:
            self._say(f"{self.out}: was interrupted before it saved a state, begins again")
            if rank:
                seed_process(self.config.seed, rank)
            return
        self._refuse_another(found)
        facts = found.facts
        self.learner.restore(found.tensors, facts["scaler"])
        self.step, self.skipped = facts["step"], facts["skipped"]
        self.best, self.best_scores = [(s, n) for s, n in facts["best"]], facts["best_scores"]
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
                self._say("processes or data.workers changed: this epoch's other shards in another order")
        self._say(f"{self.out}: goes on from step {self.step} of {self.steps} ({found.folder.name})")

    def leave(self) -> None:
        """End the process in good order, its state being saved."""
        self._say(f"metris: SIGTERM: saved step {self.step} of {self.steps}; the same command goes on there")
        self.accelerator.end_training()
        raise SystemExit(0)

    def leave_out(self, step: int, losses: Losses, micro_batches: Sequence[Batch]) -> None:
        """Write down the sentences of a step whose loss is not finite, and leave it out if that is allowed.

        Raises:
            InputError: It is not.
        """
        records = gather_object([_identity(record) for batch in micro_batches for record in batch.records])
        dump = self.out / f"nonfinite-step-{step:08d}.json"
        shown = {name: str(value) for name, value in losses._asdict().items()}
        if self.first_process and not self.config.dry_run:
            with written_whole(dump) as path:
                path.write_text(json.dumps({"step": step, **shown, "sentences": records}, indent=2) + "\n")
        line = f"step {step}: loss is {shown['total']} on sentences {[r['sent_id'] for r in records]}"
        if self.skipped >= self.config.skip_nonfinite:
            limit = f"after {self.skipped} steps left out (skip_nonfinite)" if self.skipped else ""
            raise InputError(f"{line}, see {dump} {limit}; lower learning_rate".replace(" ;", ";"))
        self.skipped += 1
        self._say(f"{line}, left out ({self.skipped} of at most {self.config.skip_nonfinite}), see {dump}")

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
            if self.first_process:
                save_weights(self.out, predictor.model)
        if self.config.keep_best > 1 and self.first_process:
            self._keep_beside(predictor.model)
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

    def _keep_beside(self, model: METRIS) -> None:
        """Keep the weights of each of the best evaluations as a checkpoint of its own."""
        folders = [self.out / BEST / f"step-{step:08d}" for _, step in self.best]
        mine = self.out / BEST / f"step-{self.step:08d}"
        if mine in folders:
            start_checkpoint(mine, to_yaml(self.config), self.predictor.tokenizer)
            save_weights(mine, model)
        for folder in set((self.out / BEST).glob("step-*")) - set(folders):
            shutil.rmtree(folder)

    def _refuse_another(self, found: state.State) -> None:
        path = self.out / CONFIG
        # What is newer than the run had its default then.
        before = build(TrainConfig, read_yaml(path, TrainConfig), source=str(path))
        held, asked = (_settings(config) for config in (before, self.config))
        keys = [key for key in {**held, **asked} if held.get(key) != asked.get(key)]
        differing = [f"{key}={held.get(key)} (asked for {asked.get(key)})" for key in keys]
        if differing:
            raise InputError(
                f"{self.out}: holds an unfinished run with {', '.join(differing)}; choose another --out"
            )
        if (then := found.facts["sentences"]) != (now := self.sampler.sentences):
            raise InputError(
                f"{self.out}: was trained on {then} sentences, now there are {now}; restore the data"
            )

    def _say(self, line: str) -> None:
        if self.first_process:
            tqdm.write(line, sys.stderr)


def _settings(config: TrainConfig) -> dict[str, str]:
    """Give all that the result depends on; places, processes and memory do not count."""
    flat = {key: str(value) for key, value in _flat(asdict(config)).items()}
    return {key: value for key, value in flat.items() if key not in (*RESOURCES, "data.root", "data.workers")}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping) and value
        flat |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def _identity(record: Record) -> dict[str, Any]:
    return {"sent_id": record.sent_id, "image_id": record.image_id, "expression": record.expression}


def _laid_out(found: Mapping[str, Any]) -> str:
    return "\n".join(f"{name.replace('_', ' '):24}{value:>12}" for name, value in found.items())
