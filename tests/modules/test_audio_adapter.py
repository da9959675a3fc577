import pytest
import torch
import torch.nn.functional as F

from omni_adapter.config import AudioAdapterConfig, dump, parse
from omni_adapter.errors import ConfigError
from omni_adapter.modules.audio_adapter import AudioAdapter

KINDS = [
    {},
    {"activation": "relu", "bias": True},
    {"activation": "gelu"},
    {"norms": ["in", "hidden"]},
    {"norms": ["in", "out"], "activation": "silu", "bias": True},
]


def adapter(stack: int = 1, **settings) -> AudioAdapter:
    torch.manual_seed(0)
    config = parse(AudioAdapterConfig, {"stack": stack, **settings}, source="test")
    return AudioAdapter(in_width=12, out_width=8, hidden_width=32, rms=0.03, config=config)


@pytest.mark.parametrize("settings", KINDS)
@pytest.mark.parametrize(("stack", "frames", "steps"), [(1, 5, 5), (2, 5, 3), (4, 8, 2), (5, 1, 1)])
def test_stacking_keeps_every_frame(stack, frames, steps, settings):
    part, features = adapter(stack, **settings), torch.randn(2, frames, 12)
    out = part(features)
    assert out.shape == (2, steps, 8)
    assert part.num_steps(frames) == steps
    changed = features.clone()
    changed[:, -1] += 1
    assert not torch.equal(part(changed)[:, -1], out[:, -1])
    assert torch.equal(part(changed)[:, :-1], out[:, :-1])


@pytest.mark.parametrize("settings", KINDS)
def test_starts_at_the_given_scale(settings):
    out = adapter(2, **settings)(torch.randn(1, 4000, 12))
    assert float(out.detach().square().mean().sqrt()) == pytest.approx(0.03, rel=0.15)


def test_the_default_is_the_swiglu_of_the_paper():
    part, frames = adapter(2), torch.randn(1, 6, 12)
    weights = part.state_dict()
    assert set(weights) == {"gate.weight", "up.weight", "down.weight"}
    stacked = frames.view(1, 3, 24)
    expected = (F.silu(stacked @ weights["gate.weight"].T) * (stacked @ weights["up.weight"].T)) @ weights[
        "down.weight"
    ].T
    torch.testing.assert_close(part(frames), expected)


def test_norms_and_biases_stand_where_the_config_says():
    part = adapter(activation="relu", bias=True, norms=["in", "hidden", "out"], norm_eps=0.5)
    assert {name: tuple(value.shape) for name, value in part.state_dict().items()} == {
        "in_norm.weight": (12,), "hidden_norm.weight": (32,), "out_norm.weight": (8,),
        "up.weight": (32, 12), "up.bias": (32,), "down.weight": (8, 32), "down.bias": (8,),
    }  # fmt: skip
    frames, weights = torch.randn(3, 12), part.state_dict()

    def norm(values, name):
        return values / (values.square().mean(-1, keepdim=True) + 0.5).sqrt() * weights[f"{name}_norm.weight"]

    hidden = norm(frames, "in") @ weights["up.weight"].T + weights["up.bias"]
    out = norm(hidden.clamp(min=0), "hidden") @ weights["down.weight"].T + weights["down.bias"]
    torch.testing.assert_close(part(frames[None])[0], norm(out, "out"))


def test_settings_survive_json_and_wrong_ones_are_named():
    config = AudioAdapterConfig(stack=5, activation="relu", bias=True, norms=("in", "out"))
    assert parse(AudioAdapterConfig, dump(config), source="test") == config
    with pytest.raises(ConfigError, match="activation: Input should be 'swiglu', 'relu', 'gelu' or 'silu'"):
        parse(AudioAdapterConfig, {"activation": "tanh"}, source="test")
    with pytest.raises(ConfigError, match="norms must name each place once"):
        parse(AudioAdapterConfig, {"norms": ["in", "in"]}, source="test")
