"""Extra causal transformer blocks between the LM and the code heads.

Hidden states in, hidden states out: [B, S, D] -> [B, S, D]. Knows nothing of LMs, codes or heads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from omni_adapter.config import TtsConfig
from omni_adapter.errors import ConfigError
from omni_adapter.step_buffer import StepBuffer

_HEAD_WIDTH = 64  # attention heads of this width where the LM's width allows it


@dataclass
class TtsCache:
    """Keys and values of the steps seen so far; owned by the caller.

    Attributes:
        capacity: steps to take memory for at once; None to grow with the steps.
        rows: batch rows to take memory for at once; more are taken if more come.
        keys: one buffer a block.
        values: likewise.
        length: steps seen, padding included.
    """

    capacity: int | None = None
    rows: int = 0
    keys: list[StepBuffer] = field(default_factory=list)
    values: list[StepBuffer] = field(default_factory=list)
    length: int = 0

    def append(self, block: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store one block's keys and values [B, H, S, W]; return those of all steps so far.

        Raises:
            ContextOverflowError: if they go beyond the capacity.
        """
        if block == len(self.keys):
            self.keys.append(StepBuffer(rows=self.rows, capacity=self.capacity))
            self.values.append(StepBuffer(rows=self.rows, capacity=self.capacity))
        return self.keys[block].append(keys), self.values[block].append(values)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(buffer.nbytes for buffer in (*self.keys, *self.values))

    def select_rows(self, indices: Tensor) -> None:
        """Keep the batch rows ``indices`` [n], in that order; a row may come several times.

        Rows that are only dropped, not repeated or moved, are dropped in place.
        """
        rows: list[int] = indices.tolist()
        if rows == sorted(set(rows)):
            self._each(lambda buffer: buffer.keep_rows(rows))
        else:
            self.keys = [buffer.selected(indices) for buffer in self.keys]
            self.values = [buffer.selected(indices) for buffer in self.values]

    def join(self, other: "TtsCache") -> None:
        """Take the rows of ``other`` behind the own ones, so that all end at the same step.

        The rows with fewer steps get columns in front that ``attention_mask`` must mask; where no rows are
        held, the steps of those that were count as well. ``other`` stays as it is.

        Raises:
            ContextOverflowError: if the steps of ``other`` go beyond the capacity.
        """
        for _ in range(len(self.keys), len(other.keys)):
            self.keys.append(StepBuffer(rows=self.rows, capacity=self.capacity))
            self.values.append(StepBuffer(rows=self.rows, capacity=self.capacity))
        for buffer, theirs in zip((*self.keys, *self.values), (*other.keys, *other.values), strict=True):
            buffer.join(theirs)
        self.length = max(self.length, other.length)

    def trim(self, steps: int) -> None:
        """Forget the first ``steps`` columns, which no row needs any more."""
        self._each(lambda buffer: buffer.trim(steps))
        self.length -= steps

    def _each(self, change: Callable[[StepBuffer], None]) -> None:
        """Change all buffers."""
        for buffer in (*self.keys, *self.values):
            change(buffer)


def attention_bias(attention_mask: Tensor | None, *, steps: int, past: int) -> Tensor | None:
    """Return which key each query may see, bool [B, 1, S, past + S], or None for plain causal attention.

    Args:
        attention_mask: None; or [B, past + S], zero at padding; or a ready [B, 1, S, past + S] (packed
            samples).
        steps: queries S.
        past: steps in the cache.
    """
    if attention_mask is None or attention_mask.dim() == 4:
        return attention_mask
    if steps == 1:
        visible = attention_mask.clone().bool()[:, None, None]
        visible[..., -1] = True
        return visible
    device = attention_mask.device
    query = torch.arange(past, past + steps, device=device)[:, None]
    key = torch.arange(past + steps, device=device)[None]
    # A padding query sees itself, so that its softmax has something to stand on.
    return ((key <= query) & attention_mask[:, None, None].bool()) | (key == query)


class QuickStep(Protocol):
    """A quicker way to a block's output in a single step."""

    def __call__(
        self,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor],
        *,
        bias: Tensor | None,
        cache: TtsCache,
        index: int,
    ) -> Tensor | None:
        """Return what ``TtsBlock`` returns, or None, having done nothing, where it cannot."""


class TtsBlock(nn.Module):
    """Pre-norm attention with rotary positions, then SwiGLU.

    Attributes:
        quick: how single steps are run, if not like all others.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        kv_heads: int,
        intermediate_width: int,
        norm_eps: float,
        qkv_bias: bool = False,
    ) -> None:
        super().__init__()
        self.quick: QuickStep | None = None
        self.head_width = width // heads
        self.attention_norm = nn.RMSNorm(width, eps=norm_eps)
        self.query = nn.Linear(width, width, bias=qkv_bias)
        self.key = nn.Linear(width, kv_heads * self.head_width, bias=qkv_bias)
        self.value = nn.Linear(width, kv_heads * self.head_width, bias=qkv_bias)
        self.output = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, eps=norm_eps)
        self.gate = nn.Linear(width, intermediate_width, bias=False)
        self.up = nn.Linear(width, intermediate_width, bias=False)
        self.down = nn.Linear(intermediate_width, width, bias=False)

    def forward(
        self,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor],
        *,
        bias: Tensor | None,
        causal: bool,
        cache: TtsCache | None = None,
        index: int = 0,
    ) -> Tensor:
        """Return the block's output, [B, S, D].

        Args:
            hidden: states, [B, S, D].
            rotation: cosines and sines of their positions.
            bias: which key each query may see, [B, 1, S, past + S]; None for all, or by ``causal``.
            causal: each query sees the keys up to its own.
            cache: keys and values of earlier steps; these steps are stored in it.
            index: which block of the cache this is.
        """
        if self.quick is not None and cache is not None and hidden.shape[1] == 1:
            output = self.quick(hidden, rotation, bias=bias, cache=cache, index=index)
            if output is not None:
                return output
        normed = self.attention_norm(hidden)
        query, key, value = (
            projection(normed).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        query, key = _rotate(query, rotation), _rotate(key, rotation)
        if cache is not None:
            key, value = cache.append(index, key, value)
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, is_causal=causal, enable_gqa=query.shape[1] != key.shape[1]
        )
        hidden = hidden + self.output(attended.transpose(1, 2).flatten(2))
        normed = self.mlp_norm(hidden)
        mlp: Tensor = self.down(F.silu(self.gate(normed)) * self.up(normed))
        return hidden + mlp


class TtsBlocks(nn.Module):
    """The TTS adapter: its own causal blocks, cache and final norm (paper, section 3.1; 6 blocks for 0.5B).

    With zero layers the hidden state goes to the heads as it is.

    Args:
        width: width D of the hidden states.
        config: number and shape of the blocks, and how they are initialised.

    Attributes:
        gradient_checkpointing: compute states again in the backward pass instead of keeping them.

    Raises:
        ConfigError: if heads do not divide the width or key/value heads do not divide the heads.
    """

    def __init__(self, *, width: int, config: TtsConfig) -> None:
        super().__init__()
        heads = config.heads or width // largest_head_width(width)
        kv_heads = config.kv_heads or heads
        if width % heads or heads % kv_heads or (width // heads) % 2:
            raise ConfigError(
                f"tts.heads must divide the LM's width {width} into even head widths and tts.kv_heads must "
                f"divide tts.heads, got heads={heads}, kv_heads={kv_heads}"
            )
        self.gradient_checkpointing = False
        self.rope_theta = config.rope_theta
        self.head_width = width // heads
        self.blocks = nn.ModuleList(
            TtsBlock(
                width=width,
                heads=heads,
                kv_heads=kv_heads,
                intermediate_width=config.intermediate_width or round_up(width * 8 // 3),
                norm_eps=config.norm_eps,
                qkv_bias=config.qkv_bias,
            )
            for _ in range(config.layers)
        )
        self.norm = nn.RMSNorm(width, eps=config.norm_eps) if config.layers else nn.Identity()
        self._init_weights(config)

    @torch.no_grad()
    def _init_weights(self, config: TtsConfig) -> None:
        """Draw matrices from N(0, 0.02); zero or depth-scale those that write into the residual stream."""
        residual_std = 0.0 if config.init == "identity" else 0.02 / (2 * max(config.layers, 1)) ** 0.5
        for name, parameter in self.named_parameters():
            if name.endswith(("output.weight", "down.weight")):
                nn.init.normal_(parameter, std=residual_std)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(
        self,
        hidden: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: TtsCache | None = None,
    ) -> Tensor:
        """Return what the code heads read, [B, S, D].

        Args:
            hidden: states of the LM, [B, S, D].
            attention_mask: as for ``attention_bias``; columns from before the cache's first are dropped.
            position_ids: [B, S]; None counts from the cache's length.
            cache: keys and values of earlier steps; these steps are added to it.
        """
        if not self.blocks:
            return hidden
        past, steps = (cache.length if cache else 0), hidden.shape[1]
        if position_ids is None:
            position_ids = torch.arange(past, past + steps, device=hidden.device)[None]
        if attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = attention_mask[:, -(past + steps) :]
        rotation = _rotation(position_ids, self.head_width, self.rope_theta, hidden.dtype)
        bias = attention_bias(attention_mask, steps=steps, past=past)
        if bias is None and past and steps > 1:
            everything = torch.ones(hidden.shape[0], past + steps, dtype=torch.bool, device=hidden.device)
            bias = attention_bias(everything, steps=steps, past=past)
        causal = bias is None and steps > 1
        recomputed = self.gradient_checkpointing and cache is None and torch.is_grad_enabled()
        for index, block in enumerate(self.blocks):
            if recomputed:
                hidden = checkpoint(block, hidden, rotation, bias=bias, causal=causal, use_reentrant=False)
            else:
                hidden = block(hidden, rotation, bias=bias, causal=causal, cache=cache, index=index)
        if cache is not None:
            cache.length += steps
        normed: Tensor = self.norm(hidden)
        return normed


def round_up(number: int, multiple: int = _HEAD_WIDTH) -> int:
    """Return the smallest multiple of ``multiple`` that is not below ``number``."""
    return -(-number // multiple) * multiple


def largest_head_width(width: int) -> int:
    """Return the largest even head width up to 64 that divides ``width``.

    Raises:
        ConfigError: if ``width`` is odd.
    """
    candidates: Sequence[int] = [size for size in range(_HEAD_WIDTH, 1, -2) if width % size == 0]
    if not candidates:
        raise ConfigError(f"TTS blocks need an even width, the base LM has {width}; use tts_layers=0")
    return candidates[0]


def _rotation(
    position_ids: Tensor, head_width: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding, each [B, 1, S, W / 2], computed in float32."""
    exponents = torch.arange(0, head_width, 2, device=position_ids.device, dtype=torch.float32) / head_width
    angles = position_ids[:, None, :, None].float() * theta**-exponents
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate(states: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the halves of each head [B, H, S, W] (half-split convention)."""
    cos, sin = rotation
    first, second = states.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
