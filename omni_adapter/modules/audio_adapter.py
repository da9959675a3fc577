"""Take encoder frames to the width of the LM: stack, then SwiGLU.

Frames in, embeddings out: [B, A', E] -> [B, A, D]. Knows nothing of encoders, LMs or prompts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CALIBRATION_FRAMES = 256


class AudioAdapter(nn.Module):
    """SwiGLU between audio encoder and LM (paper, figure 1), with optional frame stacking.

    Args:
        in_width: width E of an encoder frame.
        out_width: width D of the LM's embeddings.
        hidden_width: inside of the SwiGLU.
        stack: encoder frames that are joined into one step.
        rms: root mean square that the embeddings shall start with; the LM's own embedding table's.
    """

    def __init__(self, *, in_width: int, out_width: int, hidden_width: int, stack: int, rms: float) -> None:
        super().__init__()
        self.stack = stack
        self.gate = nn.Linear(in_width * stack, hidden_width, bias=False)
        self.up = nn.Linear(in_width * stack, hidden_width, bias=False)
        self.down = nn.Linear(hidden_width, out_width, bias=False)
        self._calibrate(rms)

    @torch.no_grad()
    def _calibrate(self, rms: float) -> None:
        """Scale the last matrix so that layer-normed frames come out with the given root mean square."""
        probe = torch.randn(_CALIBRATION_FRAMES, self.gate.in_features)
        measured = self._swiglu(probe).square().mean().sqrt()
        self.down.weight.mul_(rms / measured)

    def _swiglu(self, frames: Tensor) -> Tensor:
        hidden: Tensor = self.down(F.silu(self.gate(frames)) * self.up(frames))
        return hidden

    def num_steps(self, num_frames: int) -> int:
        """Return how many LM steps ``num_frames`` encoder frames take."""
        return -(-num_frames // self.stack)

    def forward(self, frames: Tensor) -> Tensor:
        """Return embeddings [B, A, D] of encoder frames [B, A', E]; zeros fill up the last stack."""
        missing = -frames.shape[1] % self.stack
        frames = F.pad(frames, (0, 0, 0, missing))
        return self._swiglu(frames.reshape(frames.shape[0], -1, self.gate.in_features))
