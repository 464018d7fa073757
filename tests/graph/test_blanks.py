"""Traces that don't calculate: the same as those that do, and none where values decide."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import find_groups, prune_neurons
from lightning_prune.graph import run
from lightning_prune.graph.blanks import _MAKERS, Blanks
from lightning_prune.graph.groups import draw_groups
from lightning_prune.graph.run import as_calls, traced

_aten = torch.ops.aten


def _conv(x, weight, bias=None, stride=1, padding=0, dilation=1, transposed=False, extra=0, groups=1):
    dims = x.dim() - 2
    return x, weight, bias, [stride] * dims, [padding] * dims, [dilation] * dims, transposed, [extra] * dims, groups


CALLS = {
    "mm": (_aten.mm.default, (torch.randn(3, 4), torch.randn(4, 5))),
    "mm of a transposed": (_aten.mm.default, (torch.randn(3, 4), torch.randn(5, 4).t())),
    "addmm": (_aten.addmm.default, (torch.randn(5), torch.randn(3, 4), torch.randn(4, 5))),
    "addmm, one bias": (_aten.addmm.default, (torch.randn(1), torch.randn(3, 4), torch.randn(4, 5))),
    "bmm": (_aten.bmm.default, (torch.randn(2, 3, 4), torch.randn(2, 4, 5).double().float())),
    "baddbmm": (_aten.baddbmm.default, (torch.randn(2, 3, 5), torch.randn(2, 3, 4), torch.randn(2, 4, 5))),
    "conv1d": (_aten.convolution.default, _conv(torch.randn(2, 4, 11), torch.randn(6, 4, 3), torch.randn(6), 2, 1)),
    "conv2d": (_aten.convolution.default, _conv(torch.randn(2, 4, 11, 9), torch.randn(6, 4, 3, 2), None, 2, 1, 2)),
    "conv3d": (_aten.convolution.default, _conv(torch.randn(1, 4, 5, 6, 7), torch.randn(2, 4, 2, 2, 2))),
    "grouped": (_aten.convolution.default, _conv(torch.randn(2, 6, 7, 7), torch.randn(9, 2, 3, 3), groups=3)),
    "depthwise": (_aten.convolution.default, _conv(torch.randn(2, 6, 7, 7), torch.randn(6, 1, 3, 3), groups=6)),
    "transposed": (
        _aten.convolution.default,
        _conv(torch.randn(2, 4, 5, 6), torch.randn(4, 3, 3, 3), torch.randn(6), 2, 1, 1, True, 1, 2),
    ),
    "half": (_aten.mm.default, (torch.randn(3, 4).bfloat16(), torch.randn(4, 5).bfloat16())),
    "complex": (_aten.mm.default, (torch.randn(3, 4) + 0j, torch.randn(4, 5) + 0j)),
    "double": (_aten.convolution.default, _conv(torch.randn(2, 4, 8).double(), torch.randn(6, 4, 3).double())),
}


@pytest.mark.parametrize("name", CALLS)
def test_blank_results_look_like_real_ones(name):
    func, args = CALLS[name]
    blank, real = _MAKERS[func](*args), func(*args)
    assert blank is not None
    assert blank.shape == real.shape
    assert blank.stride() == real.stride()
    assert blank.dtype == real.dtype
    assert not blank.any()


NOT_BLANK = {
    "channels last": (
        _aten.convolution.default,
        _conv(torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last), torch.randn(6, 4, 3, 3)),
    ),
    "inner sizes differ": (_aten.mm.default, (torch.randn(3, 4), torch.randn(5, 5))),
    "dtypes differ": (_aten.mm.default, (torch.randn(3, 4), torch.randn(4, 5).double())),
    "channels differ": (_aten.convolution.default, _conv(torch.randn(2, 5, 8), torch.randn(6, 4, 3))),
    "image too small": (_aten.convolution.default, _conv(torch.randn(2, 4, 2), torch.randn(6, 4, 3))),
    "wrong bias": (_aten.convolution.default, _conv(torch.randn(2, 4, 8), torch.randn(6, 4, 3), torch.randn(4))),
    "wrong batch": (_aten.bmm.default, (torch.randn(2, 3, 4), torch.randn(3, 4, 5))),
}


@pytest.mark.parametrize("name", NOT_BLANK)
def test_calls_that_fail_or_have_other_strides_are_run(name):
    func, args = NOT_BLANK[name]
    assert _MAKERS[func](*args) is None


def test_products_of_constants_are_calculated():
    a, b = torch.randn(2, 2), torch.randn(2, 2)
    blanks = Blanks(lambda tensor: tensor is a)
    assert torch.equal(blanks.run(_aten.mm.default, (a, a), {}), a @ a)
    assert not blanks.run(_aten.mm.default, (a, b), {}).any()


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def middle(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.middle(F.relu(self.b(F.relu(self.a(x)))))))


def _positive(x: Tensor) -> bool:
    """Whether a number is positive that is zero where nothing was calculated, and one otherwise."""
    return bool((x.abs().sum() > 0).item())


class _Item(_Net):
    def middle(self, x):
        return x if _positive(self.a.weight.sum() + x.abs().sum()) else torch.cat([x, x])


class _List(_Net):
    def middle(self, x):
        return x if any(map(any, x.tolist())) else x[:, :4]


class _Numpy(_Net):
    def middle(self, x):
        return x if x.numpy().any() else x[:, :4]


class _Array(_Net):
    def middle(self, x):
        return x if np.asarray(x).any() else x[:, :4]


class _Mask(_Net):
    def middle(self, x):
        rows = x[x.abs().sum(1) > 0]
        return rows.sum(0, keepdim=True) / len(rows) + x


class _Where(_Net):
    def middle(self, x):
        rows = torch.where(x.abs().sum(1) > 0)[0]
        return x[rows] * 2


class _Swallows(_Net):
    """Catches whatever comes, and goes another way then."""

    def middle(self, x):
        try:
            small = not bool((x.abs().sum() > 0).item())
        except BaseException:
            small = True
        return x[:, :4].repeat(1, 2) if small else x


class _Written(_Net):
    """A constant that takes what was not calculated decides."""

    def middle(self, x):
        table = torch.zeros(len(x), 8)
        for at in range(len(x)):
            table[at] = x[at]
        return x if _positive(table) else x.mean(1, keepdim=True).expand_as(x)


class _Raises(_Net):
    def middle(self, x):
        return torch.multinomial(x.abs().sum(1), 1) * 0 + x  # zeros are no probabilities


class _Library(_Net):
    """A function of another library, whose use of values is not known."""

    def middle(self, x):
        from torchvision.ops import nms

        boxes = torch.stack([x[:, 0], x[:, 1], x[:, 0] + 1, x[:, 1] + 1], 1)
        kept = nms(boxes, x[:, 2], 0.99)
        return x[:2] if len(kept) > 1 else x[:1]


DECIDING = [_Item, _List, _Numpy, _Array, _Mask, _Where, _Swallows, _Written, _Raises, _Library]


@pytest.fixture
def runs(monkeypatch):
    """How often a model was run while tracing, and whether it calculated."""
    seen = []
    plain = run._traced

    def counted(tracer, model, calls):
        seen.append("real" if tracer.blanks is None else "blank")
        return plain(tracer, model, calls)

    monkeypatch.setattr(run, "_traced", counted)
    return seen


def _groups(model, x, monkeypatch=None):
    return [(g.name, g.size, g.exact, sorted(map(str, g.slices))) for g in find_groups(model, x).prunable]


@pytest.mark.parametrize("kind", DECIDING)
def test_where_values_decide_the_model_runs_as_it_is(kind, runs, monkeypatch):
    model, x = kind(), torch.rand(4, 6) + 1
    with torch.no_grad():
        for layer in (model.a, model.b):
            layer.weight.abs_()
    found = _groups(model, x)
    assert runs == ["blank", "real"]
    monkeypatch.setattr(run, "has_hooks", lambda model: True)
    assert found == _groups(model, x)
    assert runs[2:] == ["real"]


class _KnownFirst(_Net):
    """What decides is there before anything is calculated."""

    def forward(self, x):
        if bool((x[:, 0] > 0).all()) and len(x[x[:, 1] > 0]) and x.tolist() and self.a.weight.sum().item():
            x = x * 2
        return super().forward(x)


class _Constant(_Net):
    def middle(self, x):
        order = torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])
        return x[:, order.tolist()] if order[0].item() and self.a.bias.numpy(force=True).any() else x


@pytest.mark.parametrize("kind", [_Net, _KnownFirst, _Constant])
def test_inputs_and_constants_may_decide(kind, runs, monkeypatch):
    model, x = kind(), torch.rand(4, 6) + 1
    found = _groups(model, x)
    assert runs == ["blank"]
    monkeypatch.setattr(run, "has_hooks", lambda model: True)
    assert found == _groups(model, x)


def test_blank_and_real_traces_say_the_same(monkeypatch):
    import torchvision

    for name in ("resnet18", "mobilenet_v3_small", "googlenet", "vit_b_32"):
        options = {"init_weights": True} if name == "googlenet" else {}
        model = torchvision.models.get_model(name, weights=None, **options)
        calls = as_calls(torch.randn(1, 3, 224, 224))
        blank = traced(model, calls)
        monkeypatch.setattr(run, "has_hooks", lambda model: True)
        real = traced(model, calls)
        monkeypatch.undo()
        assert [(c.path, c.macs) for c in blank.contractions] == [(c.path, c.macs) for c in real.contractions]
        assert [call.shapes for call in blank.calls] == [call.shapes for call in real.calls]
        one, other = draw_groups(blank), draw_groups(real)
        assert [(g.name, g.size, g.exact) for g in one.prunable] == [(g.name, g.size, g.exact) for g in other.prunable]
        assert [str(g) for g in one.frozen] == [str(g) for g in other.frozen]


class _Keeps(_Net):
    """Keeps what it calculates: a mean over its life, a list, the last result, whether it has begun."""

    def __init__(self):
        super().__init__()
        self.mean, self.last, self.history, self.begun = torch.ones(8), None, [], False
        self.cache = {"sum": torch.zeros(())}

    def middle(self, x):
        if not self.begun:
            self.begun, self.scale = True, x.std()
        self.mean.mul_(0.5).add_(x.mean(0))
        self.cache["sum"] = self.cache["sum"] + x.sum()
        self.history.append(x)
        self.last = x
        return x / self.scale


def test_what_a_model_keeps_is_what_it_calculates(runs):
    torch.manual_seed(0)
    model, x = _Keeps(), torch.rand(4, 6) + 1
    with torch.no_grad():
        model.b.bias.fill_(1)
        expected = F.relu(model.b(F.relu(model.a(x))))
    find_groups(model, x)
    assert runs == ["blank", "real"]
    torch.testing.assert_close(model.scale, expected.std())
    torch.testing.assert_close(model.mean, 0.5 + expected.mean(0))
    torch.testing.assert_close(model.cache["sum"], expected.sum())
    torch.testing.assert_close(model.last, expected)
    assert len(model.history) == 1


class _Caches(_Net):
    """Keeps a constant."""

    def middle(self, x):
        self.order = torch.arange(8) * 2
        return x + self.order


def test_constants_may_be_kept(runs):
    model = _Caches()
    find_groups(model, torch.rand(4, 6))
    assert runs == ["blank"]
    assert torch.equal(model.order, torch.arange(8) * 2)


def test_hooks_see_real_values(runs):
    model, x = _Net(), torch.rand(4, 6)
    seen = []
    model.a.register_forward_hook(lambda module, args, output: seen.append(output))
    find_groups(model, x)
    assert runs == ["real"]
    torch.testing.assert_close(seen[0], model.a(x).detach())


def test_an_error_of_the_model_comes_from_a_real_run(runs):
    class Picky(_Net):
        def middle(self, x):
            raise ValueError(f"sum {x.sum().item():.0f}")

    model = Picky()
    with torch.no_grad():
        model.b.weight.zero_()
        model.b.bias.fill_(1)
    with pytest.raises(Exception, match=r"ValueError on inputs.*sum 32"):
        find_groups(model, torch.rand(4, 6))
    assert runs == ["blank", "real"]


def test_ctrl_c_leaves_the_model_as_it_was():
    class Interrupted(_Net):
        def middle(self, x):
            self.kept = x
            raise KeyboardInterrupt

    model = Interrupted().train()
    with pytest.raises(KeyboardInterrupt):
        find_groups(model, torch.rand(4, 6))
    assert model.training
    assert not hasattr(model, "kept")


def test_random_state_and_buffers_stay(runs):
    class Counts(_Item):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def middle(self, x):
            self.seen += 1
            self.seen = self.seen + x.sum()
            return super().middle(F.dropout(x, 0.1, training=True))

    model, x = Counts(), torch.rand(4, 6) + 1
    state = torch.get_rng_state()
    prune_neurons(model, x, 0.25, verify=False)
    assert runs[:2] == ["blank", "real"]
    assert torch.equal(state, torch.get_rng_state())
    assert model.seen == 0
