import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import (
    IMAGE,
    Article,
    Inner,
    Literal,
    Nested,
    Net,
    assert_same_outputs,
    build,
    build_case,
    forward,
    inputs,
    masked_twin,
)
from torch import Tensor, nn

from lightning_prune import PruningError, find_groups, prune_neurons
from lightning_prune.graph.callsites import (
    CallSite,
    PatchedForward,
    SizePatch,
    install_patches,
    installed_patches,
    remove_patches,
)

SHAPE = (3, 8, 8)


def pruned_literal() -> tuple[nn.Module, Tensor]:
    model = build(Literal)
    prune_neurons(model, inputs(SHAPE), 0.5)
    assert model.fc.in_features == 36
    return model, inputs(SHAPE, 3, 1)


def owner(module: nn.Module) -> PatchedForward:
    return module.forward


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_copy_is_patched_by_itself(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model, x = pruned_literal()
    other = duplicate(model)
    assert owner(other) is not owner(model)
    assert owner(other).module is other
    assert installed_patches(other) == installed_patches(model)
    assert_same_outputs(other, model, x)
    with torch.no_grad():
        other.fc.bias.add_(1)
    assert torch.allclose(other(x), model(x) + 1)
    prune_neurons(other, x, 0.5)
    assert (model.fc.in_features, other.fc.in_features) == (36, 18)
    assert model(x).shape == other(x).shape == (3, 4)


def test_torch_save_and_load_bring_a_patched_module_back() -> None:
    model, x = pruned_literal()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert_same_outputs(torch.load(file, weights_only=False), model, x)


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")
@pytest.mark.parametrize("strict", [True, False])
def test_a_patched_module_can_be_exported(strict: bool) -> None:
    model, x = pruned_literal()
    program = torch.export.export(model.eval(), (x,), strict=strict)
    assert torch.equal(program.module()(x), model(x))


def test_a_patched_module_can_be_compiled_in_one_graph() -> None:
    model, x = pruned_literal()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), model(x))
    compiled(x).sum().backward()
    assert model.conv.weight.grad is not None


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:FutureWarning", "ignore::torch.jit.TracerWarning")
def test_a_patched_module_can_be_traced() -> None:
    model, x = pruned_literal()
    assert torch.equal(torch.jit.trace(model, x)(x), model(x))


def test_state_dict_and_repr_do_not_know_of_the_patch() -> None:
    model, _ = pruned_literal()
    assert set(model.state_dict()) == set(Literal().state_dict())
    assert [name for name, _ in model.named_modules()] == ["", "conv", "fc"]


def test_a_second_pruning_updates_the_same_patch() -> None:
    model, x = pruned_literal()
    (before,) = installed_patches(model)
    plan = prune_neurons(model, x, 0.5)
    assert plan.patches == tuple(installed_patches(model)) == (SizePatch(CallSite("", "view", 0), 1, 18),)
    assert owner(model).inner is None
    assert before.size == 36
    assert plan.patches[0].before == before
    assert plan.patches[0].to_dict()["before"] == before.to_dict()
    assert SizePatch.from_dict(plan.patches[0].to_dict()).before == before


def test_the_article_gets_one_patch_and_any_batch_size() -> None:
    model, x = build_case("article")
    plan = prune_neurons(model, x, 0.5)
    assert plan.patches == (SizePatch(CallSite("", "view", 0), 1, model.fc1.in_features),)
    for batch in (1, 2, 9):
        assert model(inputs((3, 32, 32), batch)).shape == (batch, 10)


FREE = {
    "flatten": lambda x: x.flatten(1),
    "view_of_len": lambda x: x.view(len(x), -1),
    "view_of_shape": lambda x: x.view(x.shape[0], x.shape[1] * x.shape[2] * x.shape[3]),
    "reshape": lambda x: x.reshape(x.size(0), -1),
    "reshape_of_numel": lambda x: torch.reshape(x, (x.size(0), x[0].numel())),
    "view_as": lambda x: x.reshape(x.flatten(1).shape),
}

WRITTEN = {
    "view": lambda x: x.view(-1, 72),
    "view_tuple": lambda x: x.view((-1, 72)),
    "view_list": lambda x: x.view([-1, 72]),
    "view_keyword": lambda x: x.view(size=(-1, 72)),
    "view_batch": lambda x: x.view(x.size(0), 72),
    "view_size": lambda x: x.view(torch.Size([x.size(0), 72])),
    "reshape": lambda x: x.reshape(-1, 8 * 3 * 3),
    "reshape_tuple": lambda x: x.reshape((-1, 72)),
    "reshape_keyword": lambda x: x.reshape(shape=(-1, 72)),
    "torch_reshape": lambda x: torch.reshape(x, (-1, 72)),
    "torch_reshape_keywords": lambda x: torch.reshape(input=x, shape=[-1, 72]),
    "two_steps": lambda x: x.view(-1, 8, 9).reshape(-1, 72),
    "permuted": lambda x: x.permute(0, 2, 3, 1).reshape(-1, 9, 8).transpose(1, 2).reshape(-1, 72),
    "expand": lambda x: x.mean((2, 3))[:, :, None].expand(-1, 8, 9).flatten(1),
    "expand_tuple": lambda x: x.mean((2, 3), keepdim=True).expand((-1, 8, 3, 3)).flatten(1),
    "expand_method": lambda x: torch.Tensor.expand(x.mean((2, 3))[..., None], (len(x), 8, 9)).flatten(1),
}


def flattening(flatten: Callable[[Tensor], Tensor]) -> nn.Module:
    return build(lambda: Net(lambda n, x: n.b(flatten(n.a(x).relu())), a=nn.Conv2d(3, 8, 3), b=nn.Linear(72, 2)))


@pytest.mark.parametrize("name", FREE)
def test_a_size_that_is_computed_needs_no_patch(name: str) -> None:
    model, x = flattening(FREE[name]), inputs(IMAGE)
    dense = copy.deepcopy(model)
    plan = prune_neurons(model, x, 0.5)
    assert plan.patches == ()
    assert "forward" not in model.__dict__
    assert_same_outputs(model, masked_twin(dense, plan.kept), x, inputs(IMAGE, 5), modes=("train",))


@pytest.mark.parametrize("name", WRITTEN)
def test_a_size_that_is_written_is_rewritten(name: str) -> None:
    model, x = flattening(WRITTEN[name]), inputs(IMAGE)
    dense = copy.deepcopy(model)
    plan = prune_neurons(model, x, 0.25)
    assert plan.patches
    assert all(patch.site.module == "" for patch in plan.patches)
    plan = plan.then(prune_neurons(model, x, 0.5))
    assert model.a.out_channels == 3
    assert_same_outputs(model, masked_twin(dense, plan.kept), x, inputs(IMAGE, 5), modes=("train",))


def test_a_literal_belongs_to_the_module_that_it_is_written_in() -> None:
    model, x = build_case("nested")
    plan = prune_neurons(model, x, 0.5, scope="layer")
    assert {(p.site.module, p.site.function, p.site.call, p.dim, p.size) for p in plan.patches} == {
        ("first", "reshape", 0, 1, 12),
        ("second", "reshape", 0, 1, 12),
        ("", "view", 0, 1, 2),
        ("", "view", 1, 1, 2),
    }
    assert model.join.out_features == 2
    assert "forward" in model.first.__dict__
    assert "forward" not in model.join.__dict__


def test_calls_are_counted_per_forward_and_past_those_of_children() -> None:
    """The model's second view comes after two views inside a child; only the right one may change."""

    class Child(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x.view(-1, 3, 5, 5)).view(-1, 8, 9)

    def run(net: Any, x: Tensor) -> Tensor:
        h = net.child(x.view(-1, 75))
        return net.out(h.view(-1, 72)) + x.view(-1, 75)[:, :2]

    model, x = build(lambda: Net(run, child=Child(), out=nn.Linear(72, 2))), inputs((75,))
    dense = copy.deepcopy(model)
    plan = prune_neurons(model, x, 0.5)
    assert plan.patches == (
        SizePatch(CallSite("", "view", 3), 1, 36),
        SizePatch(CallSite("child", "view", 1), 1, 4),
    ) or set(plan.patches) == {SizePatch(CallSite("", "view", 3), 1, 36), SizePatch(CallSite("child", "view", 1), 1, 4)}
    assert_same_outputs(model, masked_twin(dense, plan.kept), x, inputs((75,), 5), modes=("train",))


def test_a_module_that_is_called_several_times_has_one_patch() -> None:
    model, x = build_case("nested")
    groups = find_groups(model, x)
    assert {site for site, _ in groups.sized if site.module == "second"} == {CallSite("second", "reshape", 0)}
    forward(model, x)
    plan = prune_neurons(model, x, 0.4)
    assert sum(patch.site.module == "second" for patch in plan.patches) == 1
    assert [out.shape for out in forward(model, x) + forward(model, x)] == [(2, 2), (2, 2)]


def test_a_module_that_is_called_with_different_sizes_is_frozen() -> None:
    class Flat(nn.Module):
        def forward(self, x: Tensor, width: int) -> Tensor:
            return x.view(-1, width)

    def run(net: Any, x: Tensor) -> Tensor:
        return net.c(net.flat(net.a(x), 72)) + net.d(net.flat(net.b(x), 54))

    layers = {"a": nn.Conv2d(3, 8, 3), "b": nn.Conv2d(3, 6, 3), "c": nn.Linear(72, 5), "d": nn.Linear(54, 5)}
    model = build(lambda: Net(lambda n, x: n.e(run(n, x)), flat=Flat(), e=nn.Linear(5, 2), **layers))
    groups = find_groups(model, inputs(IMAGE))
    assert [g.name for g in groups.prunable] == ["c + d"]
    assert str(groups).count("view in flat has varying sizes") == 2


def test_the_users_own_forward_on_the_instance_is_kept() -> None:
    model, x = build(Literal), inputs(SHAPE)
    other = build(Literal, seed=1)
    model.forward = other.forward  # a bound method of something else
    with torch.no_grad():
        expected = other(x)
    assert torch.equal(forward(model, x)[0], expected)
    patch = SizePatch(CallSite("", "view", 0), 1, 72)
    inner = model.forward
    install_patches(model, [patch])
    assert torch.equal(forward(model, x)[0], expected)
    remove_patches(model)
    assert model.__dict__["forward"] == inner


def test_install_and_remove() -> None:
    model, x = build(Nested), inputs((3, 3, 3))
    patches = [SizePatch(CallSite("first", "reshape", 0), 1, 24), SizePatch(CallSite("", "view", 1), 1, 5)]
    before = forward(model, x)
    install_patches(model, patches)
    install_patches(model, patches[:1])
    assert sorted(installed_patches(model), key=str) == sorted(patches, key=str)
    assert torch.equal(forward(model, x)[0], before[0])
    remove_patches(model)
    assert installed_patches(model) == []
    assert all("forward" not in module.__dict__ for module in model.modules())
    remove_patches(model)


def test_a_patch_of_no_module_is_an_error_and_none_is_installed() -> None:
    model = build(Nested)
    good, bad = SizePatch(CallSite("first", "reshape", 0), 1, 24), SizePatch(CallSite("third", "view", 0), 1, 5)
    with pytest.raises(PruningError, match="no module 'third' in Nested"):
        install_patches(model, [good, bad])
    assert installed_patches(model) == []


def test_a_patch_is_plain_data() -> None:
    patch = SizePatch(CallSite("a.b", "reshape", 2), 1, 24)
    data = patch.to_dict()
    assert data == {
        **{"module": "a.b", "function": "reshape", "call": 2, "dim": 1, "size": 24},
        **{"asked": None, "of": [], "ranks": [-1, -1], "calls": 0},
    }
    assert SizePatch.from_dict(data) == patch
    with pytest.raises(PruningError, match="unknown function 'exec'; known: view, reshape, expand"):
        SizePatch.from_dict(data | {"function": "exec"})


def test_views_of_another_dtype_and_scalars_are_left_alone() -> None:
    class Bits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = Inner(), nn.Linear(24, 2)

        def forward(self, x: Tensor) -> Tensor:
            bits = x.view(torch.int64).view(torch.float64)
            scale = x.sum().view(()).view(torch.int64).view(torch.float64)
            return self.out(self.inner(bits).view(-1, 24) * scale)

    model, x = build(Bits), inputs((3, 3, 3))
    dense = copy.deepcopy(model)
    plan = prune_neurons(model, x, 0.5)
    assert {str(patch.site) for patch in plan.patches} == {
        str(CallSite("inner", "reshape", 0)),
        str(CallSite("", "view", 5)),  # the views before it are counted, though they name no size that can change
    }
    assert_same_outputs(model, masked_twin(dense, plan.kept), x)


def test_the_article_is_a_plain_module_otherwise() -> None:
    model = Article()
    prune_neurons(model, torch.rand(1, 3, 32, 32), 0.5)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert type(model) is Article


def test_a_patched_forward_shows_its_own_signature_and_exports_with_a_dynamic_batch() -> None:
    model = Article().double().eval()
    before = inspect.signature(model.forward)
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    prune_neurons(model, x, 0.5)
    assert installed_patches(model)
    assert inspect.signature(model.forward) == before
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(model, (x,), dynamic_shapes={next(iter(before.parameters)): {0: batch}}).module()
    other = torch.randn(9, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(exported(other), model(other))
