"""What is trained, on one process or many: from the micro-batches of a step to new weights."""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from reference_model.data.collate import Batch
from reference_model.data.records import Record
from reference_model.model.loss import Losses, MetrisLoss
from reference_model.model.metris import METRIS
from reference_model.training import distributed as scale
from reference_model.training import state
from reference_model.training.config import TrainConfig
from reference_model.training.objective import Objective
from reference_model.training.schedule import adamw


class StepReport(NamedTuple):
    """What a step gave, still on the device."""

    step: int
    losses: Losses
    """Scalars, the mean over micro-batches and processes."""
    norm: Tensor
    """Of the gradients before they are clipped, a scalar, the same on all processes. In fp16 it may be
    infinite while the loss scale settles; its scaler leaves such steps out."""
    sentences: list[dict[str, Any]]
    """Ids and texts of this process's micro-batches; records of shards would hold their images."""


class Learner:
    """Model, loss, optimiser and average of a run, placed and wrapped as its config says.

    Args:
        config: Of the run.
        model: METRIS, fresh.
        loss: Its loss.
        accelerator: Of the run.
    """

    def __init__(
        self, config: TrainConfig, model: METRIS, loss: MetrisLoss, accelerator: Accelerator
    ) -> None:
        self.config, self.accelerator, self.model = config, accelerator, model
        self.sharded = config.parallel.sharding == "fsdp2" and accelerator.num_processes > 1
        rates = {
            model.image_encoder: config.optim.image_encoder_lr,
            model.text_encoder: config.optim.text_encoder_lr,
        }
        frozen = [encoder for encoder, rate in rates.items() if rate == 0]
        objective = Objective(model, loss, frozen=frozen).train().to(accelerator.device)
        if config.parallel.channels_last and not self.sharded:
            model.to(memory_format=torch.channels_last)
        if config.parallel.checkpoint_activations:
            scale.checkpoint_layers(model)
        scale.share_batch_norm(objective, accelerator)

        self._buffers: list[Tensor] = []
        self.average: AveragedModel | None = None
        if config.optim.ema_decay is not None:
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.optim.ema_decay))
        # Processes score different numbers of batches, so they do it with weights that are not spread.
        self.copy = copy.deepcopy(model) if self.sharded else None
        if self.sharded:
            scale.shard(objective)
            if self.average is not None:
                scale.shard(self.average.module)
        if config.parallel.compile:
            model.compile()

        self.bare = objective
        """The objective under its own names; ``objective`` may be wrapped."""
        self.optimiser = adamw(
            objective,
            learning_rate=config.optim.learning_rate,
            weight_decay=config.optim.weight_decay,
            multipliers=rates,
        )
        self.parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
        # FSDP2 averages gradients itself.
        self.objective = objective if self.sharded else accelerator.prepare_model(objective)
        self.stepper = accelerator.prepare_optimizer(self.optimiser)

    def gradients(self, step: int, batches: Sequence[Batch]) -> "StepReport":
        """Run a step's micro-batches forward and backward, and clip the gradients, if the recipe says so.

        Nothing here waits for the device.
        """
        self.stepper.zero_grad(set_to_none=True)
        if self.checks_each_step:
            self._buffers = [buffer.clone() for buffer in self.bare.buffers()]
        sums = []
        for i, batch in enumerate(batches, start=1):
            batch = batch.to(self.accelerator.device)
            # An object may be too small for the resized mask: the records know better.
            absent = torch.tensor([record.no_target for record in batch.records], device=batch.masks.device)
            with scale.without_averaging(self.objective, last=i == len(batches)):
                with self.accelerator.autocast():
                    losses: Losses = self.objective(
                        batch.images,
                        batch.image_index,
                        batch.token_ids,
                        batch.language_mask,
                        batch.masks.float(),
                        absent,
                    )
                self.accelerator.backward(losses.total / len(batches))
            sums.append(torch.stack([value.detach().float() for value in losses]))
        means = scale.mean_over_processes(torch.stack(sums).mean(dim=0))
        if self.sharded:
            scale.average_scalars(self.parameters)
        self.accelerator.unscale_gradients()
        norm = scale.clip_gradients(self.parameters, self.config.optim.clip_norm)
        sentences = [_identity(record) for batch in batches for record in batch.records]
        return StepReport(step, Losses(*means.unbind()), norm.float(), sentences)

    @property
    def checks_each_step(self) -> bool:
        """Whether each step waits for the device to see if it was finite.

        By default none does: the optimiser's kernel leaves weights as they are where it was not, and the run
        stops where losses are read next. Where steps may be left out, their batch statistics are put back at
        once. FSDP2's kernel and the loss scale of fp16 know of no such flag.
        """
        skips = self.config.checkpointing.skip_nonfinite > 0
        return skips or self.sharded or self.accelerator.scaler is not None

    def update(self, report: "StepReport") -> None:
        """Take the optimiser's step, unless loss or gradient is not finite: then nothing changes."""
        finite = report.losses.total.isfinite() & report.norm.isfinite()
        if not self.checks_each_step:
            self.optimiser.found_inf = (~finite).float()  # read by the fused kernel, as GradScaler has it
            self.stepper.step()
        elif finite or (self.settling and report.losses.total.isfinite()):
            self.stepper.step()
        else:
            self._undo()
            return
        if self.average is not None:
            self.average.update_parameters(self.model)

    def _undo(self) -> None:
        """Undo what a step has done before the optimiser's: statistics of batch norm, fp16's record of it."""
        for buffer, before in zip(self.bare.buffers(), self._buffers, strict=True):
            buffer.copy_(before)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()

    @property
    def settling(self) -> bool:
        """Whether gradients may overflow in fp16 though nothing is wrong: its loss scale is still large."""
        scaler = self.accelerator.scaler
        return scaler is not None and scaler.get_scale() >= 1

    def kept(self) -> METRIS:
        """Give the model whose weights are scored and kept, whole; all processes must ask."""
        model = self.model if self.average is None else self.average.module
        scale.take_from_first(model)
        if self.copy is None:
            return model
        self.copy.load_state_dict({name: state.whole(t) for name, t in model.state_dict().items()})
        return self.copy

    def tensors(self) -> dict[str, Tensor]:
        """Gather all tensors of a state; all processes must ask, the first one gets them."""
        named = state.named_tensors(self.bare, self.optimiser, self.average)
        gathered = ((name, state.whole(tensor)) for name, tensor in named)
        return {name: tensor.cpu() for name, tensor in gathered if self.accelerator.is_main_process}

    def restore(self, tensors: dict[str, Tensor], scaler: dict[str, Any] | None) -> None:
        """Put back what `tensors` gave."""
        state.restore(tensors, self.bare, self.optimiser, self.average)
        if self.accelerator.scaler is not None and scaler is not None:
            self.accelerator.scaler.load_state_dict(scaler)


def _identity(record: Record) -> dict[str, Any]:
    return {"sent_id": record.sent_id, "image_id": record.image_id, "expression": record.expression}
