"""What differs between one process, copies on many, and shards on many: gradients, steps and state.

A loss goes in, a step of the optimizer comes out. Copies (``Copies``) compute apart and add their gradients
up once per step, so that a rank may leave a batch out or stop early without others waiting for it inside a
backward pass. Shards (``Shards``: FSDP2, ``DeepSpeed``: ZeRO) meet in every layer. Knows nothing of data,
files' names or schedules.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from omni_adapter.errors import CheckpointError, ConfigError, TrainingError
from omni_adapter.tensor_files import check_shapes
from omni_adapter.training.checkpoint import read_tensors, write_tensors

_BUCKET_ELEMENTS = 1 << 24  # gradients that travel together
_SHARD_VARIABLE = "ACCELERATE_USE_FSDP"
"""Set by ``accelerate launch`` for FSDP; where it has none of its own (CPU), ``Shards`` works anyway."""

Parameters = Mapping[str, nn.Parameter]


class AllRanks:
    """The processes of a run."""

    @property
    def rank(self) -> int:
        """Which of the processes this one is."""
        return dist.get_rank() if dist.is_initialized() else 0

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return dist.get_world_size() if dist.is_initialized() else 1

    def gather(self, value: Any) -> list[Any]:
        """Return the value of every process to every process."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def add(self, values: Tensor) -> Tensor:
        """Add a tensor up over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values


class Engine(Protocol):
    """Runs forward and backward passes and takes steps."""

    model: nn.Module
    """What is called for the loss."""
    parameters: Parameters
    """What learns, under full names."""
    optimizer: Any
    norm: float
    """Norm of the gradients of the last step."""
    meets_in_layers: bool
    """Whether ranks wait for each other inside forward and backward passes."""

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add the gradients of a loss to those of the step."""

    def step(self, *, is_sound: bool) -> bool:
        """Add the gradients of all ranks up, scale them to the largest norm at most, step, and forget them.

        Returns:
            Whether the optimizer stepped: not if the loss or a gradient is not finite.
        """

    def drop(self) -> None:
        """Forget the gradients of a step that was not finished."""

    def save(self, folder: Path) -> None:
        """Write weights and optimizer, this rank's share of them."""

    def load(self, folder: Path) -> None:
        """Read what ``save`` wrote."""

    def whole_weights(self) -> dict[str, Tensor] | None:
        """Return what learned, whole and on the CPU; None if the model holds it whole anyway."""


class Copies:
    """One process, or a copy of the model in each of several.

    Args:
        model: computes the loss; moved to the accelerator's device.
        optimizer: over the parameters that learn.
        accelerator: device and mixed precision.
        ranks: the processes.
        max_norm: largest norm of the gradients; 0 for no limit.
    """

    meets_in_layers = False

    def __init__(
        self, model: nn.Module, optimizer: Any, *, accelerator: Accelerator, ranks: AllRanks, max_norm: float
    ) -> None:
        self.model = model.to(accelerator.device)
        self.parameters: Parameters = learning_parameters(model)
        self.accelerator = accelerator
        self.ranks = ranks
        self.max_norm = max_norm or math.inf
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        self.norm = 0.0

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add the gradients of a loss to those of the step."""
        self.accelerator.backward(loss)

    def step(self, *, is_sound: bool) -> bool:
        """Add the gradients of all ranks up, limit their norm, step, and forget them."""
        self._add_up()
        self.accelerator.unscale_gradients(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.max_norm)
        self.norm = float(_whole(norm))
        is_sound = is_sound and math.isfinite(self.norm)
        stepped = False
        if is_sound or self.accelerator.scaler is not None:
            self.optimizer.step()  # under fp16 an unsound step is refused inside, and makes the scale smaller
            stepped = is_sound and not self.optimizer.step_was_skipped
        self.optimizer.zero_grad(set_to_none=True)
        return stepped

    def drop(self) -> None:
        """Forget the gradients of a step that was not finished."""
        self.optimizer.zero_grad(set_to_none=True)

    def save(self, folder: Path) -> None:
        """Write weights and optimizer, from the first rank; all have the same."""
        if self.ranks.rank == 0:
            write_tensors(folder / "weights.safetensors", self.parameters)
            write_tensors(
                folder / "optimizer.safetensors", optimizer_tensors(self.optimizer, self.parameters)
            )

    def load(self, folder: Path) -> None:
        """Read what ``save`` wrote."""
        load_weights(self.parameters, read_tensors(folder / "weights.safetensors"), source=str(folder))
        load_optimizer(self.optimizer, self.parameters, read_tensors(folder / "optimizer.safetensors"))

    def whole_weights(self) -> dict[str, Tensor] | None:
        """Return None: the model is whole."""
        return None

    def _add_up(self) -> None:
        """Sum the gradients of all ranks, in buckets; what no rank has stays without."""
        if self.ranks.world_size == 1:
            return
        parameters = list(self.parameters.values())
        device = parameters[0].device
        has = torch.tensor([parameter.grad is not None for parameter in parameters], device=device).int()
        dist.all_reduce(has, op=dist.ReduceOp.MAX)
        shared = [parameter for parameter, any_has in zip(parameters, has.tolist(), strict=True) if any_has]
        for parameter in shared:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([cast(Tensor, parameter.grad) for parameter in shared]):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            dist.all_reduce(flat)
            parts = torch.split(flat, [gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.view_as(gradient))


class Shards(Copies):
    """FSDP2: each process keeps a part of every weight, gradient and average.

    Args:
        model: computes the loss; returns a tuple. What is in no unit is gathered for the whole pass.
        make_optimizer: makes the optimizer of the sharded parameters.
        accelerator: device and mixed precision.
        ranks: the processes.
        max_norm: largest norm of the gradients; 0 for no limit.
        units: modules that are gathered one at a time, when they are called.
        whole: parts that every process keeps whole, because it may run them without the others.

    Raises:
        ConfigError: if a part that is to be kept whole learns.
    """

    meets_in_layers = True

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: Callable[[], Any],
        *,
        accelerator: Accelerator,
        ranks: AllRanks,
        max_norm: float,
        units: Sequence[nn.Module] = (),
        whole: Sequence[nn.Module] = (),
    ) -> None:
        from torch.distributed.fsdp import fully_shard

        model.to(accelerator.device)
        kept = {parameter for part in whole for parameter in part.parameters()}
        if any(parameter.requires_grad for parameter in kept):
            raise ConfigError("a part that learns cannot be kept whole under FSDP; freeze the audio encoder")
        for unit in units:
            if any(True for _ in unit.parameters()):
                fully_shard(unit)
        self._root: Any = fully_shard(model, ignored_params=kept)
        self._root.set_reduce_scatter_unused_params(True)  # ranks differ in what their batch needs
        super().__init__(model, make_optimizer(), accelerator=accelerator, ranks=ranks, max_norm=max_norm)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add the gradients of a loss to those of the step; the last one adds those of all ranks up."""
        self._root.set_requires_gradient_sync(is_last)
        self.accelerator.backward(loss * self.ranks.world_size)  # FSDP averages, losses are shares of a sum

    def save(self, folder: Path) -> None:
        """Write this rank's shards."""
        names = {name: _local(parameter) for name, parameter in self.parameters.items()}
        write_tensors(folder / f"weights-{self.ranks.rank:05d}.safetensors", names)
        state = optimizer_tensors(self.optimizer, self.parameters)
        write_tensors(folder / f"optimizer-{self.ranks.rank:05d}.safetensors", state)

    def load(self, folder: Path) -> None:
        """Read the shards of this rank."""
        weights = read_tensors(folder / f"weights-{self.ranks.rank:05d}.safetensors")
        load_weights(self.parameters, weights, source=str(folder))
        state = read_tensors(folder / f"optimizer-{self.ranks.rank:05d}.safetensors")
        load_optimizer(self.optimizer, self.parameters, state)

    def whole_weights(self) -> dict[str, Tensor]:
        """Return what learned, whole and on the CPU."""
        return {name: _whole(parameter).cpu() for name, parameter in self.parameters.items()}

    def _add_up(self) -> None:
        """Nothing is left to do: FSDP adds up in the backward pass."""


class DeepSpeed:
    """ZeRO, by the config file that ``accelerate launch`` was given.

    Its own files keep what it shards; they are pickles, so a run folder from others is not resumed with it.

    Args:
        model: computes the loss.
        optimizer: over the parameters that learn.
        accelerator: started by ``accelerate launch`` with a DeepSpeed config.
        ranks: the processes.
        max_norm: largest norm of the gradients; 0 for no limit.
        batch_size: samples of a micro-batch, which DeepSpeed wants to know.
    """

    meets_in_layers = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        accelerator: Accelerator,
        ranks: AllRanks,
        max_norm: float,
        batch_size: int,
    ) -> None:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = batch_size
        config["gradient_clipping"] = max_norm
        self.parameters: Parameters = learning_parameters(model)
        self.ranks = ranks
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self._engine: Any = self.model
        self._engine.optimizer.check_grad_overflow = True  # refuse steps that are not finite in any type
        self.norm = 0.0

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add the gradients of a loss to those of the step; DeepSpeed averages over ranks."""
        self._engine.set_gradient_accumulation_boundary(is_boundary=is_last)
        self._engine.backward(loss * self.ranks.world_size, scale_wrt_gas=False)

    def step(self, *, is_sound: bool) -> bool:
        """Let the optimizer step; it refuses by itself where gradients are not finite."""
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        self.norm = float(norm) if norm is not None else 0.0
        return is_sound and not getattr(self._engine.optimizer, "overflow", False)

    def drop(self) -> None:
        """Refuse: gradients are spread over ranks and buckets."""
        raise TrainingError(
            "a batch did not fit into memory under DeepSpeed, where no step can be taken back; start again: "
            "the run goes on from its newest checkpoint; lower data.batch_size or data.max_length"
        )

    def save(self, folder: Path) -> None:
        """Let DeepSpeed write its state."""
        self._engine.save_checkpoint(str(folder), tag="deepspeed", exclude_frozen_parameters=True)

    def load(self, folder: Path) -> None:
        """Let DeepSpeed read its state."""
        self._engine.load_checkpoint(str(folder), tag="deepspeed", load_module_strict=False)

    def whole_weights(self) -> dict[str, Tensor]:
        """Return what learned, whole and on the CPU."""
        import deepspeed

        found = {}
        for name, parameter in self.parameters.items():
            with deepspeed.zero.GatheredParameters([parameter]):
                found[name] = parameter.detach().cpu().clone()
        return found


def take_shard_wish() -> bool:
    """Return whether ``accelerate launch`` was told to use FSDP, and take that task from Accelerate.

    It shards by classes of layers that are named in its config; ``find_layers`` finds those of any base.
    """
    return os.environ.pop(_SHARD_VARIABLE, "false").lower() == "true"


def find_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a model: members of its outermost lists of modules."""
    found: list[nn.Module] = []
    for child in model.children():
        found.extend(child if isinstance(child, nn.ModuleList) else find_layers(child))
    return found


def learning_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what learns, under full names."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def optimizer_tensors(optimizer: Any, parameters: Parameters) -> dict[str, Tensor]:
    """Return the state of an optimizer as tensors called ``average/parameter``; shards stay shards."""
    state = optimizer.state
    return {
        f"{key}/{name}": _local(value)
        for name, parameter in parameters.items()
        for key, value in state.get(parameter, {}).items()
    }


def load_optimizer(optimizer: Any, parameters: Parameters, tensors: Mapping[str, Tensor]) -> None:
    """Restore what ``optimizer_tensors`` returned.

    Raises:
        CheckpointError: if a tensor belongs to no parameter.
    """
    for key, tensor in tensors.items():
        average, _, name = key.partition("/")
        if name not in parameters:
            raise CheckpointError(f"the optimizer's state names {name!r}, which does not learn in this run")
        parameter = parameters[name]
        # A count of steps is one number beside a weight of any shape.
        value = _like(parameter, tensor) if tensor.dim() else tensor.to(parameter.device)
        optimizer.state[parameter][average] = value


def load_weights(parameters: Parameters, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Copy tensors into parameters of the same names.

    Raises:
        CheckpointError: if names or shapes differ.
    """
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    expected = {name: list(_local(parameter).shape) for name, parameter in parameters.items()}
    check_shapes(shapes, expected=expected, source=source)
    for name, parameter in parameters.items():
        _local(parameter).copy_(tensors[name])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; on the CPU that is a plain ``RuntimeError``."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one type that travel together."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size + tensor.numel() > _BUCKET_ELEMENTS or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket


def _local(tensor: Any) -> Tensor:
    """This rank's part of a tensor, which is all of it where nothing is sharded."""
    part = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return cast(Tensor, part.detach())


def _whole(tensor: Any) -> Tensor:
    """All of a tensor, gathered where it is sharded."""
    return cast(Tensor, (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach())


def _like(parameter: nn.Parameter, tensor: Tensor) -> Tensor:
    """A tensor on a parameter's device, sharded as the parameter is."""
    if not hasattr(parameter, "to_local"):
        return tensor.to(parameter.device)
    empty: Any = torch.zeros_like(parameter.detach())
    empty.to_local().copy_(tensor)
    return cast(Tensor, empty)
