import pytest
import torch

from omni_adapter.modules.audio_adapter import AudioAdapter


def adapter(stack: int) -> AudioAdapter:
    torch.manual_seed(0)
    return AudioAdapter(in_width=12, out_width=8, hidden_width=32, stack=stack, rms=0.03)


@pytest.mark.parametrize(("stack", "frames", "steps"), [(1, 5, 5), (2, 5, 3), (4, 8, 2), (5, 1, 1)])
def test_stacking_keeps_every_frame(stack, frames, steps):
    part, features = adapter(stack), torch.randn(2, frames, 12)
    out = part(features)
    assert out.shape == (2, steps, 8)
    assert part.num_steps(frames) == steps
    changed = features.clone()
    changed[:, -1] += 1
    assert not torch.equal(part(changed)[:, -1], out[:, -1])
    assert torch.equal(part(changed)[:, :-1], out[:, :-1])


def test_starts_at_the_given_scale():
    out = adapter(2)(torch.randn(1, 4000, 12))
    assert float(out.detach().square().mean().sqrt()) == pytest.approx(0.03, rel=0.15)
