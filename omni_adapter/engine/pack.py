"""Repack the weights of a model for the machine that it runs on.

A model and a precision in; the same model, whose linear layers multiply by the quickest kernels that the
precision allows, and a report of what was done out. What cannot be packed stays as it was and is listed. The
model only runs from then on: it does not learn, move or get saved.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from omni_adapter.backbone import Backbone
from omni_adapter.backbone.inspection import find_head
from omni_adapter.backbone.probes import sample
from omni_adapter.engine.kernels import Kernel
from omni_adapter.engine.linears import PackedLinear, Siblings
from omni_adapter.engine.memory import MappedFiles, let_go, trim
from omni_adapter.engine.precision import Choice, choose_precision
from omni_adapter.engine.recognise import quicken
from omni_adapter.engine.rehearsal import (
    Casting,
    Part,
    cast,
    linear_bias,
    linear_weight,
    replace_module,
)
from omni_adapter.engine.selection import Selection, Shape, cheap_rows
from omni_adapter.errors import BackboneError, ConfigError
from omni_adapter.model import OmniModel

logger = logging.getLogger(__name__)

_DECODED_ROWS = 2  # rows of a step: one that speaks and one that writes
_HEARD_ROWS = 64  # rows of a recording: some seconds
_TRIED_KERNELS = 8  # of one shape, to see what rows cost
_TRIMMED_BYTES = 1 << 26
_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class PackSettings:
    """How to pack.

    Attributes:
        kernels: names of kernels to choose from; a single one is taken without measuring. None for all of the
            precision.
        fuse: give siblings one product; None where it is measured to pay.
        budget_s: seconds that measuring may take.
    """

    kernels: tuple[str, ...] | None = None
    fuse: bool | None = None
    budget_s: float = 1.0


@dataclass(frozen=True)
class PackedLayer:
    """A product.

    Attributes:
        names: layers that it serves.
        outputs: rows of its weight.
        inputs: columns of its weight.
        kernel: name of what computes it.
    """

    names: tuple[str, ...]
    outputs: int
    inputs: int
    kernel: str


@dataclass(frozen=True)
class PackReport:
    """What became of a model's weights.

    Attributes:
        precision: ``fp32``, ``bf16`` or ``int8``.
        asked: the same or ``auto``.
        reason: why this precision.
        activations: type of everything between the products.
        layers: what was packed.
        kept: layers that stay as they were, by name, and why.
        quick: blocks of layers whose single steps go by a formula that was found to be theirs, with one call
            for all that lies between two products.
        bytes_before: memory of all weights before.
        bytes_after: and after.
        errors: by what comes out (``text``, ``codes``, ``hearing``), how far it is from the unpacked model on
            a few steps, as a share of its norm.
        seconds: that packing took.
    """

    precision: str
    asked: str
    reason: str
    activations: str
    layers: tuple[PackedLayer, ...] = ()
    kept: Mapping[str, str] = field(default_factory=dict)
    quick: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    errors: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def kernels(self) -> dict[str, int]:
        """Products by kernel."""
        counts: dict[str, int] = {}
        for layer in self.layers:
            counts[layer.kernel] = counts.get(layer.kernel, 0) + 1
        return counts

    def __str__(self) -> str:
        """One line."""
        kernels = ", ".join(f"{count} x {name}" for name, count in self.kernels.items()) or "none"
        errors = ", ".join(f"{name} {error:.2g}" for name, error in self.errors.items())
        return (
            f"precision {self.precision} ({self.asked}: {self.reason}); {kernels}; {len(self.kept)} layers "
            f"kept; {self.quick} blocks quick; "
            f"weights {self.bytes_before / 1e6:.0f} -> {self.bytes_after / 1e6:.0f} MB; off by {errors}"
        )


def light(*roots: nn.Module, precision: str | None) -> AbstractContextManager[None]:
    """Let the weights of ``roots`` be read without staying in memory, if they are to be packed smaller.

    Nothing may write to weights inside.
    """
    if precision is None or precision == "fp32":
        return nullcontext()
    return MappedFiles().released_after_use(*roots)


@torch.no_grad()
def pack(model: OmniModel, precision: str = "auto", *, settings: PackSettings | None = None) -> PackReport:
    """Repack the weights of ``model`` in place.

    Args:
        model: in evaluation mode; LoRA in it is added to the base's weights where that can be.
        precision: one of ``PRECISIONS``.
        settings: how to choose kernels.

    Returns:
        What was done. On an accelerator the weights are only cast, since its own libraries choose kernels.

    Raises:
        ConfigError: if the precision or a kernel is unknown, or the model is packed already.
    """
    started_s = time.perf_counter()
    settings = settings or PackSettings()
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        raise ConfigError("the weights are packed already; load the talker again for another precision")
    choice = choose_precision(precision, model.device)
    before = _bytes_of(model)
    model.requires_grad_(False).eval()
    let_go(model)
    _fold_lora(model.backbone)
    if model.device.type == "cpu":
        report = _Packer(model, choice, asked=precision, settings=settings).run()
    else:
        report = _cast_all(model, choice, asked=precision)
    seconds = time.perf_counter() - started_s
    report = replace(report, bytes_before=before, bytes_after=_bytes_of(model), seconds=seconds)
    logger.info("%s", report)
    return report


def relative_error(came: Tensor, expected: Tensor) -> float:
    """How far a result is from another, as a share of the other's norm."""
    return float((came.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-30))


def _cast_all(model: OmniModel, choice: Choice, *, asked: str) -> PackReport:
    """Give an accelerator the type that it computes in."""
    precision, reason = choice
    if precision == "int8":
        precision, reason = "bf16", "8 bits are for processors; an accelerator computes in bfloat16"
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    model.to(dtype)
    return PackReport(precision, asked, reason, str(dtype).removeprefix("torch."))


def _fold_lora(backbone: Backbone) -> None:
    """Add LoRA to the base's weights, where that can be."""
    try:
        backbone.merge_lora()
    except BackboneError as error:
        logger.info("LoRA stays beside the base: %s", error)


class _Packer:
    """Packs one model on a processor.

    Args:
        model: changed in place; its LoRA was added to the base's weights, where that can be.
        choice: of the precision.
        asked: what was asked for.
        settings: how to choose kernels.
    """

    def __init__(self, model: OmniModel, choice: Choice, *, asked: str, settings: PackSettings) -> None:
        self.model, self.choice, self.asked, self.settings = model, choice, asked, settings
        self.selection = Selection(choice.precision, names=settings.kernels, budget_s=settings.budget_s)
        self.layers: list[PackedLayer] = []
        self.kept: dict[str, str] = {}
        self.files = MappedFiles()  # of those that LoRA was not added to
        self._packed_bytes = 0

    def run(self) -> PackReport:
        """Pack, part by part and layer by layer."""
        model, backbone = self.model, self.model.backbone
        with self.files.released_after_use(model):
            backbone.settle()
            castings = {part.name: (part, cast(part)) for part in parts_of(model)}
        activations = self._activations(castings["backbone.lm"][1])
        # What was made in memory goes before what lies in files: it makes room.
        for part, casting in reversed(castings.values()):
            self.kept |= {f"{part.name}.{name}": reason for name, reason in casting.kept.items()}
            # The largest first: while one is packed, it is there twice.
            for group in sorted(casting.groups, key=lambda names: -_size_of(part, names)):
                self._pack_group(part, group, dtype=activations)
            let_go()
        tables = [backbone.embedding_table]
        if self.choice.precision != "fp32":
            tables.append(model.code_embedding.weight)  # comes out as what it is added to
        widen(model, dtype=activations, but=tables)
        self._narrow_table(activations)
        backbone.activation_dtype = activations
        backbone.cheap_columns = self._cheap_columns()
        quick = quicken(model) if activations == torch.float32 else 0
        errors = {
            _OUTPUTS[name]: max(map(relative_error, part.run(), casting.outputs))
            for name, (part, casting) in castings.items()
            if name in _OUTPUTS
        }
        let_go(model)
        return PackReport(
            self.choice.precision,
            self.asked,
            self.choice.reason,
            str(activations).removeprefix("torch."),
            tuple(self.layers),
            self.kept,
            quick=quick,
            errors=errors,
        )

    def _cheap_columns(self) -> int:
        """Measured with the products that most of a pass goes into; what it was where none is packed."""
        backbone = self.model.backbone
        head = find_head(backbone.lm)
        shapes: dict[tuple[int, int], list[Kernel]] = {}
        for layer in backbone.lm.modules():
            if isinstance(layer, PackedLinear) and layer.kernel is not None and layer is not head:
                outputs = layer.out_features if layer.siblings is None else layer.siblings.size
                kernels = shapes.setdefault((outputs, layer.in_features), [])
                if layer.kernel not in kernels:
                    kernels.append(layer.kernel)
        if not shapes:
            return backbone.cheap_columns
        (_, inputs), kernels = max(shapes.items(), key=lambda entry: sum(one.nbytes for one in entry[1]))
        return cheap_rows(kernels[:_TRIED_KERNELS], inputs, rows=_DECODED_ROWS)

    def _activations(self, casting: Casting) -> torch.dtype:
        """Type of what lies between the products: float32, unless most weights stay in half as they are."""
        backbone = self.model.backbone
        packed = {f"{name}.weight" for group in casting.groups for name in group}
        table = backbone.embedding_table
        sizes = {True: 0, False: 0}
        for name, weight in backbone.lm.named_parameters():
            if weight.dim() > 1 and weight is not table:
                sizes[name in packed] += weight.numel()
        stays = self.choice.precision != "fp32" and sizes[False] > sizes[True]
        return backbone.dtype if stays and backbone.dtype in _HALVES else torch.float32

    def _pack_group(self, part: Part, names: tuple[str, ...], *, dtype: torch.dtype) -> None:
        """Pack layers that get the same input, together if it pays; their weights are let go."""
        weights = [linear_weight(part.root.get_submodule(name)) for name in names]
        shapes = [Shape(weight.shape[0], weight.shape[1], part.rows) for weight in weights]
        fuses = self.settings.fuse
        if len(names) > 1 and not (self.selection.fuses(shapes) if fuses is None else fuses):
            for name in names:
                self._pack_group(part, (name,), dtype=dtype)
            return
        shape = Shape(sum(one.outputs for one in shapes), shapes[0].inputs, part.rows)
        kind = self.selection.kernel(shape)
        record = PackedLayer(
            tuple(f"{part.name}.{name}" for name in names), shape.outputs, shape.inputs, kind.name
        )
        if kind.name == "plain-fp32" and len(names) == 1:
            self.layers.append(record)  # the layer itself is this kernel
            return
        kernel = self._make(kind, part, names)
        siblings = Siblings(kernel, [one.outputs for one in shapes], in_order=True)
        for index, (name, weight) in enumerate(zip(names, weights, strict=True)):
            layer = PackedLinear(
                siblings.member(index) if len(names) > 1 else kernel,
                weight=weight,
                dtype=dtype,
                label=self.choice.precision,
                bias=linear_bias(part.root.get_submodule(name)),
                kernel=kernel,
                siblings=siblings if len(names) > 1 else None,
            )
            replace_module(part.root, name, layer)
            self.files.release(weight)
        self.layers.append(record)
        self._packed_bytes += kernel.nbytes
        if self._packed_bytes > _TRIMMED_BYTES:  # what was freed is in small pieces, which stay otherwise
            del weights, weight
            self._packed_bytes = 0
            trim()

    def _make(self, kind: type[Kernel], part: Part, names: Sequence[str]) -> Kernel:
        """A kernel with the weights of layers, one below the other."""
        members = [part.root.get_submodule(name) for name in names]
        weights, biases = [linear_weight(member) for member in members], [linear_bias(m) for m in members]
        weight = weights[0] if len(members) == 1 else torch.cat(weights)
        used = self.files.release if len(members) == 1 else None
        if all(bias is None for bias in biases):
            return kind(weight, None, used=used)
        filled = [
            weight.new_zeros(len(own)) if bias is None else bias
            for own, bias in zip(weights, biases, strict=True)
        ]
        return kind(weight, torch.cat(filled), used=used)

    def _narrow_table(self, activations: torch.dtype) -> None:
        """Keep the input embeddings in bfloat16, or in the file where they lie; they come out wide."""
        backbone = self.model.backbone
        module, table = backbone.lm.get_input_embeddings(), backbone.embedding_table
        narrows = self.choice.precision != "fp32" and not self.files.holds(table)
        if not narrows and table.dtype == activations:
            return
        if narrows:
            wide = table.data
            table.data = table.data.to(torch.bfloat16)
        handle = module.register_forward_hook(lambda module, inputs, output: output.to(activations))
        try:
            backbone(sample(backbone, steps=1))
        except RuntimeError as error:  # the LM uses the table for more than looking ids up
            logger.info("the input embeddings stay as they were: %s", error)
            handle.remove()
            table.data = (wide if narrows else table.data).to(activations)


_OUTPUTS = {"backbone.lm": "text", "code_heads": "codes", "audio_encoder.encoder": "hearing"}
"""What comes out of parts."""


def parts_of(model: OmniModel) -> Iterator[Part]:
    """Yield what is packed, each with a short run."""
    generator = torch.Generator().manual_seed(0)
    backbone, encoder = model.backbone, model.audio_encoder

    def run_lm() -> tuple[Tensor, ...]:
        steps = sample(backbone)
        pair = torch.cat([steps, steps.flip(1)])
        # Logits of all steps: of some, torch's product in half precision copies the whole head.
        first = backbone(pair[:, :-1], use_cache=True)
        second = backbone(pair[:, -1:], cache=first.cache, use_cache=True)
        return first.logits, first.tapped, second.logits, second.tapped

    yield Part("backbone.lm", backbone.lm, run_lm, _DECODED_ROWS)
    frames = 4 * encoder.stride
    features = torch.randn(1, encoder.num_mel_bins, frames, generator=generator)

    def run_encoder() -> tuple[Tensor, ...]:
        return (encoder(features, torch.tensor([frames])).frames,)

    yield Part("audio_encoder.encoder", encoder.encoder, run_encoder, _HEARD_ROWS)
    adapter, width = model.audio_adapter, model.config.encoder_width
    heard = torch.randn(1, 2 * adapter.stack, width, generator=generator)
    dtype = _dtype_of(model)
    yield Part("audio_adapter", adapter, lambda: (adapter(heard.to(dtype())),), _HEARD_ROWS)
    hidden = torch.randn(1, 2, model.config.hidden_width, generator=generator)

    def run_voice() -> tuple[Tensor, ...]:
        return (model.speak(hidden.to(dtype())),)

    yield Part("tts_blocks", model.tts_blocks, run_voice, _DECODED_ROWS)
    yield Part("code_heads", model.code_heads, run_voice, 1)


def _size_of(part: Part, names: Sequence[str]) -> int:
    """Numbers in the weights of layers."""
    return sum(linear_weight(part.root.get_submodule(name)).numel() for name in names)


def _dtype_of(model: OmniModel) -> Callable[[], torch.dtype]:
    """The type of the grafted parts, which packing changes."""
    return lambda: model.audio_adapter.up.weight.dtype


def widen(model: nn.Module, *, dtype: torch.dtype, but: Sequence[Tensor]) -> None:
    """Cast what is left in half precision to ``dtype``, one tensor after the other.

    Args:
        model: its parameters and buffers.
        dtype: of the activations.
        but: tensors that stay.
    """
    staying = {id(tensor) for tensor in but}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype in _HALVES and id(tensor) not in staying:
            tensor.data = tensor.data.to(dtype)


def _bytes_of(model: nn.Module) -> int:
    """Memory of all weights, packed or not; what is shared counts once."""
    tensors = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        if isinstance(module, PackedLinear) and module.kernel is not None:
            tensors[id(module.kernel)] = module.kernel.nbytes
    return sum(tensors.values())
