"""SNAC's decoder as a stream: latents of one frame in, the samples that can no longer change out.

Latents [n, B, C] -> samples [m, B]. Knows nothing of codes, files or settings of a SNAC.

Time stands first and channels last: the rows of B conversations that share a moment lie together, so every
convolution of width one is one matrix product over all rows, a wider one reaches B rows further for each step
of its dilation, and a transposed one is one matrix product and the addition of neighbours. Every layer keeps
the inputs that its next outputs need; no sample is computed twice. (``len`` of a tensor is a Python function;
``shape[0]`` is not.)

Some arithmetic is done at load. ``x + sin(a x)^2 / a`` is ``(u + sin(u)^2) / a`` with ``u = a x``: where a
convolution stands before or behind it, ``a`` is part of that one's weights. A bias before a Snake is part of
the Snake's argument; until then the rows are without it ("owed").
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, Protocol

import torch
from snac.layers import DecoderBlock, NoiseBlock, ResidualUnit, Snake1d
from torch import Tensor, nn

from omni_adapter.arithmetic import has_vectors_of_64_bytes
from omni_adapter.audio.snake import SnakeCalls, snake_calls
from omni_adapter.errors import CodeGridError, ConfigError
from omni_adapter.products import TiledWeight, can_tile

CodecPrecision = Literal["fp32", "bf16"]

_PIECE_OUTPUTS = 1 << 10  # of a weight that are laid out at once


@dataclass
class DecoderState:
    """What a streaming decoder remembers between chunks.

    Attributes:
        seeds: seed of each conversation's noise, length B.
        first_frames: absolute number of the first frame of each conversation, length B; places the noise.
        num_frames: frames decoded so far.
        finished: whether the last frame has been decoded.
        buffers: what each layer holds back, [n, B, C] by the layer's name; never changed in place.
        noise_positions: outputs of each noise block so far, by the block's name.
    """

    seeds: list[int]
    first_frames: list[int]
    num_frames: int = 0
    finished: bool = False
    buffers: dict[str, Tensor] = field(default_factory=dict)
    noise_positions: dict[str, int] = field(default_factory=dict)

    def __deepcopy__(self, memo: Any) -> "DecoderState":
        """A state that goes its own way: tensors are shared, as none is changed in place."""
        return select_states(self, None)


def select_states(state: DecoderState, conversations: Sequence[int] | None) -> DecoderState:
    """Return the state of some conversations of a stream, in the order given; all of them for None."""
    chosen = range(len(state.seeds)) if conversations is None else conversations
    buffers = state.buffers
    if conversations is not None:
        buffers = {name: held[:, list(conversations)] for name, held in buffers.items()}
    return DecoderState(
        seeds=[state.seeds[place] for place in chosen],
        first_frames=[state.first_frames[place] for place in chosen],
        num_frames=state.num_frames,
        finished=state.finished,
        buffers=dict(buffers),
        noise_positions=dict(state.noise_positions),
    )


def can_join(first: DecoderState, second: DecoderState) -> bool:
    """Whether two streams hold equally much, as all do after their first frames."""
    shapes = [
        {name: (len(held), *held.shape[2:]) for name, held in state.buffers.items()}
        for state in (first, second)
    ]
    return shapes[0] == shapes[1] and first.finished == second.finished


def join_states(states: Sequence[DecoderState]) -> DecoderState:
    """Make one stream of several, so that one call decodes the next frames of all.

    Args:
        states: streams of the same codec, any number of conversations each; they stay as they are.

    Raises:
        CodeGridError: if some hold more than others: see :func:`can_join`.
    """
    first = states[0]
    for place, state in enumerate(states):
        if not can_join(first, state):
            raise CodeGridError(
                f"stream {place} holds back another number of samples after {state.num_frames} frames than "
                f"stream 0 after {first.num_frames}; join streams once each is past its first frames"
            )
    return DecoderState(
        seeds=[seed for state in states for seed in state.seeds],
        # All count frames with the first from now on.
        first_frames=[
            frame + state.num_frames - first.num_frames for state in states for frame in state.first_frames
        ],
        num_frames=first.num_frames,
        finished=first.finished,
        buffers={name: torch.cat([state.buffers[name] for state in states], dim=1) for name in first.buffers},
        noise_positions=dict(first.noise_positions),
    )


def can_round(device: torch.device) -> bool:
    """Whether ``bf16`` can be had on a device."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return True
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@dataclass(frozen=True)
class _Step:
    """One pass through the decoder: the stream's state, and whether it only flushes what is held back."""

    state: DecoderState
    last: bool

    def take(self, name: str) -> Tensor | None:
        """What the layer ``name`` holds back, None at the start of a stream."""
        return self.state.buffers.get(name)

    def keep(self, name: str, held: Tensor) -> None:
        """Hold back ``held`` for the layer ``name``; a copy, so that nothing larger stays alive."""
        self.state.buffers[name] = held.clone(memory_format=torch.contiguous_format)


class SnacDecoder:
    """A SNAC's decoder with its weights laid out for streaming.

    Args:
        decoder: the ``decoder`` of a :class:`snac.SNAC`, weight norms folded.
        latents_per_frame: latents that one frame of codes makes.
        precision: ``fp32`` computes in the weights' own dtype; ``bf16`` rounds the operands of the large
            matrix products, while everything between them stays as it was.

    Raises:
        ConfigError: if the decoder has a layer that is not known.
    """

    def __init__(
        self, decoder: nn.Module, *, latents_per_frame: int, precision: CodecPrecision = "fp32"
    ) -> None:
        self._entry: list[_Convolution] = []
        self._stages: list[_Stage] = []
        self._exit: _Exit | None = None
        layers: Any = decoder.model
        rate, owed = latents_per_frame, None
        for index, layer in enumerate(layers):
            name = f"decoder.{index}"
            match layer:
                case nn.Conv1d() if not self._stages:
                    self._entry.append(_Convolution(layer, name=name))
                case DecoderBlock() if self._exit is None:
                    stage = _Stage(layer.block, name=name, owed=owed, rate=rate, precision=precision)
                    self._stages.append(stage)
                    rate, owed = stage.rate, stage.owed
                case nn.Conv1d() if isinstance(layers[index - 1], Snake1d) and self._exit is None:
                    self._exit = _Exit(layers[index - 1], layer, name=name, owed=owed)
                case Snake1d() | nn.Tanh():  # the first is part of the convolution behind it
                    continue
                case _:
                    raise _unknown(layer)

    def __deepcopy__(self, memo: Any) -> "SnacDecoder":
        """Itself: it is never changed. A copied codec lays out its own weights before its next stream."""
        return self

    def __call__(self, latents: Tensor, state: DecoderState, *, last: bool = False) -> Tensor:
        """Decode the latents [n, B, C] of one frame, or none with ``last``, to samples [m, B]."""
        assert self._exit is not None
        step = _Step(state, last)
        rows = latents
        for conv in self._entry:
            rows = conv(rows, step)
        for stage in self._stages:
            rows = stage(rows, step)
        return self._exit(rows, step)


class _Stage:
    """A block of the decoder: Snake, upsampling, noise, residual units.

    The rows of all layers behind the upsampling stand in one buffer. A residual unit lags behind its input,
    so its outputs begin where rows of the pass before are put back: each adds to its rows in place.
    """

    def __init__(
        self, layers: Any, *, name: str, owed: Tensor | None, rate: int, precision: CodecPrecision
    ) -> None:
        snake, conv, *rest = layers
        if not isinstance(snake, Snake1d) or not isinstance(conv, nn.ConvTranspose1d):
            raise _unknown(conv if isinstance(snake, Snake1d) else snake)
        self._snake = _Snake(snake, owed=owed, whole=True)
        self._rounded = precision == "bf16"
        self._upsample = _Upsample(conv, name=f"{name}.1", precision=precision)
        self.rate = rate * self._upsample.stride
        self.owed: Tensor = conv.weight.new_zeros(conv.out_channels)
        if conv.bias is not None:
            self.owed = conv.bias.detach().clone()
        self._noise: _Noise | None = None
        self._residuals: list[_Residual] = []
        for place, layer in enumerate(rest, start=2):
            match layer:
                case NoiseBlock() if place == 2:
                    self._noise = _Noise(
                        layer, name=f"{name}.{place}", rate=self.rate, owed=self.owed, precision=precision
                    )
                case ResidualUnit():
                    unit = _Residual(layer, name=f"{name}.{place}", owed=self.owed, precision=precision)
                    self._residuals.append(unit)
                    self.owed = unit.owed
                case _:
                    raise _unknown(layer)
        self._room = sum(unit.padding for unit in self._residuals)

    def __call__(self, x: Tensor, step: _Step) -> Tensor:
        buffer, start = self._upsample(self._snake(x, rounded=self._rounded), step, room=self._room)
        stop = buffer.shape[0]
        if self._noise is not None:
            self._noise(buffer[start:], step)
        for unit in self._residuals:
            start, stop = unit(buffer, start, stop, step)
        return buffer[start:stop]


class _Snake:
    """``a (x + sin(a x)^2 / a)`` of rows x that are owed a bias; ``whole`` without the ``a`` before it."""

    def __init__(self, snake: Snake1d, *, owed: Tensor | None, whole: bool = False) -> None:
        alpha = snake.alpha.detach()[0, :, 0]
        # An alpha of nothing makes the identity, which a tiny one does as well, and that has an inverse.
        tiny = torch.full_like(alpha, torch.finfo(alpha.dtype).eps).copysign(alpha)
        self.scale = torch.where(alpha.abs() < tiny.abs(), tiny, alpha)
        self.inverse = self.scale.reciprocal()
        self.shift = None if owed is None else self.scale * owed
        self._after = self.inverse if whole else None
        self._calls = _calls_for(alpha)

    def __call__(self, x: Tensor, out: Tensor | None = None, *, rounded: bool = False) -> Tensor:
        """Compute it, written to ``out`` if given; rows are contiguous. ``rounded`` may give bfloat16."""
        if self._calls is not None:
            return self._calls.snake(x, self.scale, self.shift, after=self._after, out=out, rounded=rounded)
        if self.shift is None:
            out = torch.mul(x, self.scale, out=out)
        else:
            out = torch.addcmul(self.shift, x, self.scale, out=out)
        out = _wave_(out, None)
        return out if self._after is None else out.mul_(self._after)


def _calls_for(weight: Tensor) -> SnakeCalls | None:
    """The compiled calls, if they take rows like this weight."""
    return snake_calls() if _is_for_calls(weight) else None


def _is_for_calls(weight: Tensor) -> bool:
    """Whether compiled calls read numbers like a weight's."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32


def _wave_(x: Tensor, calls: SnakeCalls | None) -> Tensor:
    """``x + sin(x)^2``, in place."""
    if calls is not None:
        return calls.snake(x, out=x)
    wave = x.sin()
    return x.addcmul_(wave, wave)


class _Product(Protocol):
    """A weight that rows are multiplied with."""

    def __call__(self, rows: Tensor) -> Tensor:
        """``rows`` [n, I] times the weight, [n, O]."""

    def add_to(self, total: Tensor, rows: Tensor, factor: Tensor | None = None) -> None:
        """Add it to ``total`` [n, O], in place; each row times its ``factor`` [n], if given."""


class _Matrix:
    """A product in the weight's own dtype.

    Args:
        weight: [I, O].
        bias: [O].
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, rows: Tensor) -> Tensor:
        return rows @ self._weight if self._bias is None else torch.addmm(self._bias, rows, self._weight)

    def add_to(self, total: Tensor, rows: Tensor, factor: Tensor | None = None) -> None:
        if factor is not None:
            total.addcmul_(self(rows), factor[:, None])
        elif self._bias is not None:
            total += self(rows)
        else:
            total.addmm_(rows, self._weight)


class _RoundedMatrix:
    """A product of operands rounded to bfloat16, by the packed kernels of oneDNN where there are any."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._calls = _calls_for(weight)
        weight = weight.t().to(torch.bfloat16).contiguous()  # [O, I]
        self._bias = None if bias is None else bias.to(torch.bfloat16)
        self._width = len(weight)
        self._packed = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, None) if self._packed else weight

    def __call__(self, rows: Tensor) -> Tensor:
        if rows.dtype != torch.bfloat16:
            rows = rows.to(torch.bfloat16) if self._calls is None else self._calls.round(rows)
        if self._packed and rows.shape[0]:
            product = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")
        elif self._packed:
            product = rows.new_empty(0, self._width)
        else:
            product = nn.functional.linear(rows, self._weight, self._bias)
        assert isinstance(product, Tensor)
        return product

    def add_to(self, total: Tensor, rows: Tensor, factor: Tensor | None = None) -> None:
        product = self(rows)
        if self._calls is not None:
            self._calls.add_rounded(total, product, factor)
        else:
            total += product if factor is None else product * factor[:, None]


class _TiledMatrix(_Matrix):
    """A product in float32 by the compiled calls: a row's does not depend on what stands beside it."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight, bias)
        inputs, outputs = weight.shape
        self._tiles = TiledWeight(outputs, inputs, dtype=weight.dtype, scale=None, bias=bias)
        for start in range(0, outputs, _PIECE_OUTPUTS):
            self._tiles.fill(start, weight[:, start : start + _PIECE_OUTPUTS].t().contiguous())

    def __call__(self, rows: Tensor) -> Tensor:
        return self._tiles(rows)


def _product(weight: Tensor, bias: Tensor | None = None, *, precision: CodecPrecision) -> _Product:
    return _Matrix(weight, bias) if precision == "fp32" else _RoundedMatrix(weight, bias)


def _spreading(weight: Tensor, bias: Tensor | None = None, *, precision: CodecPrecision = "fp32") -> _Product:
    """A product that makes many numbers of few, which libraries made for square ones are slow at.

    Where vectors have 64 bytes they are quick enough.
    """
    if precision == "fp32" and _is_for_calls(weight) and not has_vectors_of_64_bytes() and can_tile():
        return _TiledMatrix(weight, bias)
    return _product(weight, bias, precision=precision)


class _Convolution:
    """Convolution with stride 1; the zeros of its padding stand at the two ends of the stream.

    Args:
        conv: its sizes and weights.
        name: under which its inputs are held back.
        weight: used instead of the convolution's own.
        bias: likewise.
    """

    def __init__(
        self, conv: nn.Conv1d, *, name: str, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> None:
        self.name = name
        weight = (conv.weight if weight is None else weight).detach()
        self.bias = conv.bias if bias is None else bias
        self.padding, self.dilation = int(conv.padding[0]), int(conv.dilation[0])
        self.reach, self.groups = reach(conv), conv.groups
        self.out_channels = conv.out_channels
        self._matrix: _Product | None = None
        if self.reach == 0 and self.groups == 1:
            self._matrix = _spreading(weight[:, :, 0].t(), self.bias)
        self._weight = weight.unsqueeze(2).contiguous(memory_format=torch.channels_last)
        self._places: Tensor | None = None  # of a channel by itself, [places, C]
        self._calls = _calls_for(weight)
        if self.groups == conv.in_channels == conv.out_channels:
            self._places = weight[:, 0].t().contiguous()

    def __call__(self, x: Tensor, step: _Step) -> Tensor:
        """Convolve the next rows [n, B, C]."""
        rows = self.room(x.shape[0], x, step)
        kept = rows.shape[0] - x.shape[0] - (self.padding if step.last else 0)
        rows[kept : kept + x.shape[0]] = x
        return self.convolve(rows, step)

    def room(self, count: int, like: Tensor, step: _Step) -> Tensor:
        """Rows [m, B, C] that begin with those held back, and have room for ``count`` more.

        The padding of the stream's end, if this is it, stands behind them.
        """
        if self.reach == 0:
            return like.new_empty(count, *like.shape[1:])
        held = step.take(self.name)
        kept = self.padding if held is None else held.shape[0]
        rows = like.new_empty(kept + count + (self.padding if step.last else 0), *like.shape[1:])
        rows[:kept] = 0 if held is None else held
        rows[kept + count :] = 0
        return rows

    def convolve(self, rows: Tensor, step: _Step, *, wave: bool = False, rounded: bool = False) -> Tensor:
        """Rows [m, B, C], as :meth:`room` lays them out, to the outputs that they are enough for.

        With ``wave`` outputs x become ``x + sin(x)^2``, and ``rounded`` may make them bfloat16.
        """
        batch, width = rows.shape[1:]
        count = max(0, rows.shape[0] - self.reach)
        if self.reach:
            step.keep(self.name, rows[count:])
        if count == 0:
            return rows.new_empty(0, batch, self.out_channels)
        if wave and self._calls is not None and self._places is not None:
            flat, dilation = rows.view(-1, width), self.dilation * batch
            out = self._calls.depthwise_snake(
                flat, self._places, self.bias, dilation=dilation, rounded=rounded
            )
            return out.view(count, batch, width)
        out = self._multiply(rows, count)
        return _wave_(out, self._calls) if wave else out

    def _multiply(self, rows: Tensor, count: int) -> Tensor:
        batch, width = rows.shape[1:]
        if self._matrix is not None:
            return self._matrix(rows.reshape(-1, width)).view(count, batch, self.out_channels)
        image = rows.view(1, 1, -1, width).permute(0, 3, 1, 2)  # [1, C, 1, m B], channels last
        out = nn.functional.conv2d(
            image, self._weight, self.bias, dilation=(1, self.dilation * batch), groups=self.groups
        )
        return out.permute(0, 2, 3, 1).reshape(count, batch, self.out_channels).contiguous()


class _Upsample:
    """Transposed convolution whose kernel spans two strides: each input adds to two blocks of outputs.

    Its bias is owed to the outputs.
    """

    def __init__(self, conv: nn.ConvTranspose1d, *, name: str, precision: CodecPrecision) -> None:
        self.name = name
        self.stride, self.crop, self.out_channels = (
            int(conv.stride[0]),
            int(conv.padding[0]),
            conv.out_channels,
        )
        self._dtype = conv.weight.dtype  # of the outputs; inputs may be rounded
        # [I, 2 * stride * O]: a view where the weight is laid out by `lay_out`
        weight = conv.weight.detach().permute(0, 2, 1).reshape(conv.in_channels, -1)
        self._product = _spreading(weight, precision=precision)

    def __call__(self, x: Tensor, step: _Step, *, room: int) -> tuple[Tensor, int]:
        """Return the outputs in a buffer [rows, B, C] with ``room`` before them, and where they begin."""
        count, batch, _ = x.shape
        stride, crop = self.stride, self.crop
        held = step.take(self.name)  # what the last input adds to the outputs to come, [stride, B, C]
        total = count * stride + (crop if step.last else 0)
        buffer = x.new_empty(room + total, batch, self.out_channels, dtype=self._dtype)
        if count == 0 and held is None:
            return buffer, room
        ahead = held
        if count:
            spread = self._product(x.reshape(count * batch, -1))
            near, far = spread.view(count, batch, 2, stride, -1).permute(2, 0, 3, 1, 4)  # [n, stride, B, C]
            out = buffer[room : room + count * stride].view(count, stride, batch, -1)
            torch.add(near[1:], far[:-1], out=out[1:])
            out[0] = near[0] if held is None else near[0] + held
            ahead = far[-1].to(self._dtype)
            step.keep(self.name, ahead)
        if step.last:
            assert ahead is not None
            buffer[room + count * stride :] = ahead[:crop]
        return buffer, room + (crop if held is None else 0)


class _Noise:
    """Noise that depends on nothing but the seed and its absolute place in time."""

    def __init__(
        self, block: NoiseBlock, *, name: str, rate: int, owed: Tensor, precision: CodecPrecision
    ) -> None:
        self._name, self._rate = name, rate
        weight = block.linear.weight.detach()[:, :, 0]
        self._product = _product(weight.t(), weight @ owed, precision=precision)

    def __call__(self, x: Tensor, step: _Step) -> None:
        """Add it to the rows [n, B, C], in place."""
        if x.shape[0] == 0:
            return
        start, rate = step.state.noise_positions.get(self._name, 0), self._rate
        stop = start + x.shape[0]
        step.state.noise_positions[self._name] = stop
        frames = range(start // rate, -(-stop // rate))
        noise = torch.stack(
            [
                torch.cat([_draw_noise(rate, f"{seed}/{self._name}/{first + frame}") for frame in frames])
                for seed, first in zip(step.state.seeds, step.state.first_frames, strict=True)
            ],
            dim=1,
        )  # [rate * frames, B]
        noise = noise[start - frames.start * rate : stop - frames.start * rate].to(x)
        rows = x.view(-1, x.shape[-1])
        self._product.add_to(rows, rows, noise.reshape(-1))


@lru_cache(maxsize=256)
def _draw_noise(size: int, seed: str) -> Tensor:
    """Noise [size]; shared, and never changed."""
    digest = hashlib.blake2b(seed.encode(), digest_size=4).digest()
    return torch.randn(size, generator=torch.Generator().manual_seed(int.from_bytes(digest, "little")))


class _Residual:
    """Snake, convolution, Snake, convolution of width one, added to the rows that they came from."""

    def __init__(self, unit: ResidualUnit, *, name: str, owed: Tensor, precision: CodecPrecision) -> None:
        if [type(layer) for layer in unit.block] != [Snake1d, nn.Conv1d, Snake1d, nn.Conv1d]:
            raise _unknown(unit)
        first, conv, second, mix = unit.block
        self._first, inner = _Snake(first, owed=owed), _Snake(second, owed=None)
        inverse = self._first.inverse.view(conv.groups, -1).repeat_interleave(
            conv.out_channels // conv.groups, dim=0
        )  # of the inputs of each output, [O, I / groups]
        weight = inner.scale[:, None, None] * conv.weight.detach() * inverse[:, :, None]
        bias = torch.zeros_like(inner.scale) if conv.bias is None else conv.bias.detach()
        self._conv = _Convolution(conv, name=f"{name}.block.1", weight=weight, bias=bias * inner.scale)
        self._mix = _product(
            (mix.weight.detach()[:, :, 0] * inner.inverse).t().contiguous(), precision=precision
        )
        self.owed = owed if mix.bias is None else owed + mix.bias.detach()
        self._name, self.padding, self._rounded = name, self._conv.padding, precision == "bf16"

    def __call__(self, buffer: Tensor, start: int, stop: int, step: _Step) -> tuple[int, int]:
        """Work on the rows ``start`` to ``stop`` of a buffer [rows, B, C] in place.

        Returns:
            Where the outputs begin and end. They lag behind the inputs, which wait for them.
        """
        x = buffer[start:stop]
        rows = self._conv.room(x.shape[0], x, step)
        kept = rows.shape[0] - x.shape[0] - (self.padding if step.last else 0)
        self._first(x, out=rows[kept : kept + x.shape[0]])
        added = self._conv.convolve(rows, step, wave=True, rounded=self._rounded)
        waiting = step.take(self._name)
        if waiting is not None:
            start -= waiting.shape[0]
            buffer[start : start + waiting.shape[0]] = waiting
        outputs = buffer[start : start + added.shape[0]]
        step.keep(self._name, buffer[start + added.shape[0] : stop])
        if added.shape[0]:
            width = buffer.shape[-1]
            self._mix.add_to(outputs.view(-1, width), added.view(-1, width))
        return start, start + added.shape[0]


class _Exit:
    """Snake and the convolution to one channel, as a product for each place in its kernel; tanh."""

    def __init__(self, snake: Snake1d, conv: nn.Conv1d, *, name: str, owed: Tensor | None) -> None:
        if conv.out_channels != 1 or conv.groups != 1 or conv.dilation[0] != 1:
            raise _unknown(conv)
        self._name, self._snake = name, _Snake(snake, owed=owed)
        self._weight = (conv.weight.detach()[0] * self._snake.inverse[:, None]).contiguous()  # [C, places]
        self._bias = conv.bias
        self._padding, self._places = int(conv.padding[0]), self._weight.shape[1]

    def __call__(self, x: Tensor, step: _Step) -> Tensor:
        count, batch, width = x.shape
        places = self._places
        held = step.take(self._name)
        kept = self._padding if held is None else held.shape[0]
        rows = x.new_empty(kept + count + (self._padding if step.last else 0), batch, places)
        rows[:kept] = 0 if held is None else held
        rows[kept + count :] = 0
        torch.mm(self._snake(x).view(-1, width), self._weight, out=rows[kept : kept + count].view(-1, places))
        outputs = max(0, rows.shape[0] - (places - 1))
        step.keep(self._name, rows[outputs:])
        # An output adds place k of the row k later.
        strides = (batch * places, places, batch * places + 1)
        samples = rows.as_strided((outputs, batch, places), strides).sum(-1)
        if self._bias is not None:
            samples += self._bias
        return samples.tanh_()


def reach(conv: nn.Conv1d) -> int:
    """Inputs beside its first that one output of a convolution needs."""
    return int((conv.kernel_size[0] - 1) * conv.dilation[0])


def lay_out(decoder: nn.Module) -> None:
    """Give the weights of transposed convolutions the order in memory in which streaming reads them."""
    for conv in decoder.modules():
        if isinstance(conv, nn.ConvTranspose1d):
            conv.weight.data = conv.weight.data.permute(0, 2, 1).contiguous().permute(0, 2, 1)


def _unknown(layer: nn.Module) -> ConfigError:
    return ConfigError(f"the installed snac has a layer that streaming does not know: {type(layer).__name__}")
