"""Take encoder frames to the width of the LM: stack, then SwiGLU or another MLP.

Frames in, embeddings out: [B, A', E] -> [B, A, D]. Knows nothing of encoders, LMs or prompts.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni_adapter.config import AudioAdapterConfig

_CALIBRATION_FRAMES = 256
_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
}


class AudioAdapter(nn.Module):
    """SwiGLU between audio encoder and LM (paper, figure 1), or another MLP, with optional frame stacking.

    Args:
        in_width: width E of an encoder frame.
        out_width: width D of the LM's embeddings.
        hidden_width: its inside.
        rms: root mean square that the embeddings shall start with; the LM's own embedding table's.
        config: frames that are joined into one step, activation, biases and norms.
    """

    def __init__(
        self, *, in_width: int, out_width: int, hidden_width: int, rms: float, config: AudioAdapterConfig
    ) -> None:
        super().__init__()
        self.stack = config.stack
        self.in_width = in_width * config.stack
        widths = {"in": self.in_width, "hidden": hidden_width, "out": out_width}
        norms = {
            place: nn.RMSNorm(width, eps=config.norm_eps) if place in config.norms else nn.Identity()
            for place, width in widths.items()
        }
        self.in_norm, self.hidden_norm, self.out_norm = norms["in"], norms["hidden"], norms["out"]
        is_gated = config.activation == "swiglu"
        self.gate = nn.Linear(self.in_width, hidden_width, bias=config.bias) if is_gated else None
        self.up = nn.Linear(self.in_width, hidden_width, bias=config.bias)
        self.down = nn.Linear(hidden_width, out_width, bias=config.bias)
        self.activation = _ACTIVATIONS[config.activation]
        self._calibrate(rms)

    @torch.no_grad()
    def _calibrate(self, rms: float) -> None:
        """Scale what writes the embeddings, so that layer-normed frames come out with the given ``rms``."""
        measured = self._project(torch.randn(_CALIBRATION_FRAMES, self.in_width)).square().mean().sqrt()
        last = self.down if isinstance(self.out_norm, nn.Identity) else self.out_norm
        for parameter in last.parameters():
            parameter.mul_(rms / measured)

    def _project(self, frames: Tensor) -> Tensor:
        frames = self.in_norm(frames)
        hidden = self.up(frames)
        hidden = self.activation(hidden) if self.gate is None else self.activation(self.gate(frames)) * hidden
        embeddings: Tensor = self.out_norm(self.down(self.hidden_norm(hidden)))
        return embeddings

    def num_steps(self, num_frames: int) -> int:
        """Return how many LM steps ``num_frames`` encoder frames take."""
        return -(-num_frames // self.stack)

    def forward(self, frames: Tensor) -> Tensor:
        """Return embeddings [B, A, D] of encoder frames [B, A', E]; zeros fill up the last stack."""
        missing = -frames.shape[1] % self.stack
        frames = F.pad(frames, (0, 0, 0, missing))
        return self._project(frames.reshape(frames.shape[0], -1, self.in_width))
