"""Rates over a run, and what each weight gets of them."""

import pytest

from omni_adapter.errors import TrainingError
from omni_adapter.training.optimizer import make_optimizer, rate_share
from omni_adapter.training.settings import OptimSettings
from tests.training.toy import ToyModel


def test_rate_rises_and_falls():
    settings = OptimSettings(num_steps=100, warmup_steps=10, final_share=0.1)
    shares = [rate_share(step, settings) for step in range(100)]
    assert shares[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert shares[10] == 1
    assert shares[10:] == sorted(shares[10:], reverse=True)
    assert shares[55] == pytest.approx(0.55)
    assert rate_share(100, settings) == pytest.approx(0.1)


def test_each_group_has_its_rate_and_only_matrices_decay():
    model = ToyModel()
    groups = {"head": dict(model.head.named_parameters()), "rest": dict(model.layers.named_parameters())}
    settings = OptimSettings(learning_rate=1e-3, group_rates={"head": 2.0}, weight_decay=0.5)
    optimizer = make_optimizer(groups, settings, rates={"head": 9.0, "rest": 3.0})
    found = {
        (group["peak_lr"], group["weight_decay"]): len(group["params"]) for group in optimizer.param_groups
    }
    assert found == {(2.0, 0.5): 1, (2.0, 0.0): 1, (3.0, 0.5): 2, (3.0, 0.0): 2}
    with pytest.raises(TrainingError, match="nothing learns"):
        make_optimizer({}, settings, rates={})
