"""One process or many: devices, gradients that are averaged, weights that are spread, memory that is saved.

`accelerate` picks the device and the processes that torchrun started, wraps the model for DDP and for
bf16 or fp16, and scales the loss of fp16. Its FSDP2 wants GPUs, so torch's own is called, which does not.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from reference_model.files import InputError
from reference_model.processes import join_processes
from reference_model.training.config import TrainConfig


def start_processes(config: TrainConfig) -> Accelerator:
    """Join the processes that torchrun started, if it did, and take the device of this one.

    Raises:
        InputError: The device cannot be had, or cannot do what is asked for.
    """
    device = join_processes(config.device)
    if device.type == "cuda" and ":" in config.device:
        torch.cuda.set_device(device)  # whose random numbers a state takes
    if config.parallel.precision == "fp16" and device.type != "cuda":
        raise InputError(f"precision fp16: needs a GPU, the device is {device}; use bf16 or float32")
    if config.parallel.precision == "fp16" and config.parallel.sharding == "fsdp2":
        raise InputError("precision fp16: its loss scaling does not know sharding fsdp2; use bf16")
    # It is one for the whole process otherwise, with the settings of the run before.
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        cpu=device.type != "cuda",
        device_placement=False,
        mixed_precision={"float32": "no"}.get(config.parallel.precision, config.parallel.precision),
        log_with=None if config.logging.tracker == "none" else config.logging.tracker,
        project_dir=config.out,
        step_scheduler_with_optimizer=False,
    )
    if accelerator.num_processes == 1:
        accelerator.state.device = device  # as asked for, be it cuda:1
    return accelerator


# ------------------------------------------------------------------------------------ layers and their memory


def layers(module: nn.Module) -> list[nn.Module]:
    """Find the repeated layers of a model: members of lists that have parts of their own, outermost first."""
    found: list[nn.Module] = []
    for child in module.children():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and any(True for _ in child.children()):
            found.append(child)
        else:
            found += layers(child)
    return found


def checkpoint_layers(model: nn.Module) -> None:
    """Let each layer forget what it computed and compute it again for the backward pass.

    Layers with batch norm stay as they are: computed twice, they would count a batch twice.
    """
    for layer in layers(model):
        if not any(isinstance(part, _BatchNorm) for part in layer.modules()):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def share_batch_norm(model: nn.Module, accelerator: Accelerator) -> None:
    """Let batch norm see the batch of all processes, where its kernel can."""
    several = accelerator.num_processes > 1
    if several and any(isinstance(part, _BatchNorm) for part in model.modules()):
        if accelerator.device.type == "cuda":
            convert_sync_batchnorm(model)  # timm's: torch's drops the activation of timm's fused layers
        else:
            accelerator.print("batch norm: on the CPU each process takes the statistics of its own sentences")


def shard(module: nn.Module) -> None:
    """Spread parameters over all processes with FSDP2, layer by layer; scalars stay whole."""
    mesh = dist.init_device_mesh("cuda" if dist.get_backend() != "gloo" else "cpu", (dist.get_world_size(),))
    scalars = {p for p in module.parameters() if p.ndim == 0}
    for layer in layers(module):
        fully_shard(layer, mesh=mesh, ignored_params=scalars)
    fully_shard(module, mesh=mesh, ignored_params=scalars)


# ------------------------------------------------------------------------------------------------- gradients


def without_averaging(module: nn.Module, *, last: bool) -> Any:
    """Keep gradients in this process until the ``last`` micro-batch of a step."""
    if hasattr(module, "set_requires_gradient_sync"):
        module.set_requires_gradient_sync(last)
        return nullcontext()
    return module.no_sync() if hasattr(module, "no_sync") and not last else nullcontext()


def average_scalars(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients that FSDP2 leaves to its caller: those of parameters that it does not spread."""
    for p in parameters:
        if p.grad is not None and not isinstance(p.grad, DTensor):
            dist.all_reduce(p.grad.div_(dist.get_world_size()))


def clip_gradients(parameters: Sequence[nn.Parameter], most: float | None) -> Tensor:
    """Scale all gradients alike so that their norm is at most ``most``, if given, and return what it was.

    The same on all processes, whether gradients are averaged or spread.
    """
    # Those that are spread and those that are not.
    kinds = [[p for p in parameters if p.grad is not None and isinstance(p.grad, DTensor) is spread]
             for spread in (False, True)]  # fmt: skip
    norms = [nn.utils.get_total_norm([p.grad for p in kind]) for kind in kinds if kind]
    whole = [x.full_tensor() if isinstance(x, DTensor) else x for x in norms]
    norm = whole[0] if len(whole) == 1 else torch.stack(whole).norm()
    if most is not None:
        for kind in kinds:
            nn.utils.clip_grads_with_norm_(kind, most, norm)
    return norm


def on_first(accelerator: Accelerator, task: Callable[[], Any]) -> Any:
    """Do something on the first process alone and give its result to all; they wait for it.

    Raises:
        InputError: The first process met it, or an OSError; all raise it, so that none waits for ever.
    """
    if accelerator.num_processes == 1:
        return task()
    result, error = None, None
    if accelerator.is_main_process:
        try:
            result = task()
        except (InputError, OSError) as failure:
            error = str(failure)
    result, error = broadcast_object_list([result, error])
    if error is not None:
        raise InputError(error)
    return result


def mean_over_processes(values: Tensor) -> Tensor:
    """Average a tensor over all processes; every one gets the same."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def any_process(flag: bool) -> bool:
    """Whether a flag is set in any process; all must ask. Goes by the CPU, so that no GPU is waited for."""
    return flag if not dist.is_initialized() else mean_over_processes(torch.tensor(float(flag))).item() > 0


def take_from_first(module: nn.Module) -> None:
    """Give all processes the buffers of the first one: batch statistics differ where each has its own."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)
