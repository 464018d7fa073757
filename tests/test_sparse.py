import copy

import pytest
import torch
from networks import Snapshot
from torch import nn

from lightning_prune import NoEffectWarning, PruningError, prune_weights, to_semi_structured

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def test_a_model_elsewhere_than_on_a_gpu_is_left_alone() -> None:
    model = net()
    prune_weights(model, 0.5, pattern="2:4")
    snapshot = Snapshot(model)
    with pytest.raises(PruningError, match="need an NVIDIA GPU, but '0' is on cpu"):
        to_semi_structured(model)
    snapshot.assert_unchanged()


def test_a_dense_model_has_nothing_to_turn() -> None:
    model = net()
    with pytest.warns(NoEffectWarning, match="prune with pattern='2:4' first"):
        assert to_semi_structured(model) == []


@cuda
def test_outputs_stay_what_they_were() -> None:
    model = net().cuda().half()
    prune_weights(model, 0.5, pattern="2:4")
    dense = copy.deepcopy(model)
    assert to_semi_structured(model) == ["0.weight"]
    x = torch.randn(64, 128, device="cuda", dtype=torch.float16)
    torch.testing.assert_close(model(x), dense(x), rtol=1e-2, atol=1e-2)


@cuda
def test_single_precision_is_refused() -> None:
    model = net().cuda()
    prune_weights(model, 0.5, pattern="2:4")
    with pytest.raises(PruningError, match=r"is float32; call model\.half"):
        to_semi_structured(model)
