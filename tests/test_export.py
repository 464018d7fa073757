import copy
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import (
    CASES,
    Literal,
    Net,
    Snapshot,
    assert_same_outputs,
    build,
    build_case,
    inputs,
    networks,
    recurrent,
    resnet,
    shared_block,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_prune import PruningError, load_pruned, prune_neurons, prune_weights, save_pruned
from lightning_prune.export import _checksum
from lightning_prune.graph.callsites import installed_patches
from lightning_prune.models import LeNet


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert list(first) == list(second)
    for name, tensor in first.items():
        other = second[name]
        assert (tensor.dtype, tensor.shape, bits(tensor)) == (other.dtype, other.shape, bits(other)), name


def as_strings(model: nn.Module) -> list[str]:
    return sorted(map(str, installed_patches(model)))


SPARSE = [(name, weights) for name in ("article", "resnet", "tied_square", "nested") for weights in (0.5, 0.95)]


@pytest.mark.parametrize(("name", "weights"), [*((name, 0.0) for name in CASES), *SPARSE])
def test_a_fresh_model_becomes_the_saved_one(name: str, weights: float, tmp_path: Path) -> None:
    model, x = build_case(name)
    prune_neurons(model, x, 0.4)
    if weights:
        prune_weights(model, weights)
    save_pruned(model, tmp_path / "model.safetensors")
    fresh = CASES[name][0]().double()
    assert load_pruned(tmp_path / "model.safetensors", fresh) is fresh
    assert_same_state(fresh, model)
    assert repr(fresh) == repr(model)
    assert as_strings(fresh) == as_strings(model)
    assert_same_outputs(fresh, model, x, inputs(CASES[name][1], 3), modes=("train",))


@given(networks())
def test_the_same_for_random_networks(
    tmp_path_factory: pytest.TempPathFactory, drawn: tuple[nn.Module, tuple[int, ...]]
) -> None:
    model, shape = drawn
    fresh, path = copy.deepcopy(model), tmp_path_factory.mktemp("export") / "model"
    prune_neurons(model, inputs(shape), 0.4)
    save_pruned(model, str(path))
    for parameter in fresh.parameters():
        nn.init.zeros_(parameter)
    load_pruned(str(path), fresh)
    assert_same_state(fresh, model)
    assert_same_outputs(fresh, model, inputs(shape))


INF, NAN = float("inf"), float("nan")


def odd_tensors() -> dict[str, Tensor]:
    special = torch.tensor([0.0, -0.0, INF, -INF, NAN, 1e-40, 5e-324, 1.0])
    negative_nan = torch.tensor([0x7FC00001, -0x3FFFFF, 1], dtype=torch.int32).view(torch.float32)
    sparse = torch.zeros(1000)
    sparse[[3, 500, 999]] = torch.tensor([-0.0, NAN, 2.5])
    return {
        "special64": special.double(),
        "special32": special,
        "special16": special.half(),
        "special_bf16": special.bfloat16(),
        "payload": torch.cat([negative_nan, torch.zeros(100)]),
        "sparse32": sparse,
        "sparse64": sparse.double(),
        "sparse_bf16": sparse.bfloat16(),
        "sparse_half": sparse.half(),
        "all_zero": torch.zeros(17, 3),
        "all_minus_zero": -torch.zeros(17),
        "one_zero": torch.zeros(()),
        "scalar": torch.tensor(-3.5),
        "empty": torch.zeros(0),
        "empty3d": torch.zeros(3, 0, 2),
        "bools": torch.arange(50) % 7 == 0,
        "no_bools": torch.zeros(50, dtype=torch.bool),
        "int8": torch.zeros(50, dtype=torch.int8),
        "int64": torch.tensor([0, 0, 0, 0, 0, -(2**63), 2**63 - 1]),
        "uint8": torch.tensor([0, 255], dtype=torch.uint8),
        "count": torch.tensor(7),
        "complex": torch.tensor([0j, 1 - 2j, complex(0, -0.0)]),
        "transposed": torch.arange(12.0).view(3, 4).T,
        "strided": torch.arange(24.0).view(4, 6)[::2, ::3],
        "expanded": torch.tensor([1.5]).expand(40),
        "sparse_transposed": torch.eye(30).T[::2],
        "channels_last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }


class Holder(nn.Module):
    """Tensors of any kind, as buffers and where possible as parameters too."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(f"buffer_{name}", tensor)
            if tensor.is_floating_point() or tensor.is_complex():
                self.register_parameter(f"parameter_{name}", nn.Parameter(tensor.clone()))


def test_every_bit_of_every_tensor_comes_back(tmp_path: Path) -> None:
    model = Holder(odd_tensors())
    save_pruned(model, tmp_path / "file")
    fresh = Holder({name: torch.zeros(t.shape, dtype=t.dtype) for name, t in odd_tensors().items()})
    load_pruned(tmp_path / "file", fresh)
    assert_same_state(fresh, model)


@given(st.lists(st.floats(width=32) | st.just(0.0), max_size=40), st.sampled_from([torch.float32, torch.float64]))
def test_any_floats_come_back(
    tmp_path_factory: pytest.TempPathFactory, values: list[float], dtype: torch.dtype
) -> None:
    path = tmp_path_factory.mktemp("export") / "file"
    model, fresh = (Holder({"x": torch.tensor(v, dtype=dtype)}) for v in (values, [7.0] * len(values)))
    save_pruned(model, path)
    load_pruned(path, fresh)
    assert_same_state(fresh, model)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
def test_floats_of_one_byte_come_back(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.randn(40, 50) * (torch.rand(40, 50) < 0.1)
    model, fresh = Holder({"x": values.to(dtype)}), Holder({"x": torch.ones(40, 50).to(dtype)})
    save_pruned(model, tmp_path / "file")
    load_pruned(tmp_path / "file", fresh)
    bits = {1: torch.uint8, 2: torch.int16}[dtype.itemsize]
    for name, tensor in model.state_dict().items():
        assert fresh.state_dict()[name].dtype == dtype
        assert torch.equal(fresh.state_dict()[name].view(bits), tensor.view(bits))
    assert len(load_file(tmp_path / "file")) == 4  # a mask and values of each


def test_saving_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = build(resnet)
    prune_weights(model, 0.9)
    snapshot = Snapshot(model)
    save_pruned(model, tmp_path / "file")
    snapshot.assert_unchanged()


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    for make in (shared_block, recurrent):
        model = build(make)
        prune_neurons(model, inputs((4,)), 0.5)
        save_pruned(model, tmp_path / "file")
        fresh = load_pruned(tmp_path / "file", make().double())
        assert_same_state(fresh, model)
        if make is shared_block:
            assert fresh[4].weight is fresh[2].weight
            assert sum("weight" in key for key in load_file(tmp_path / "file")) == 3


@pytest.mark.filterwarnings("ignore::lightning_prune.NoEffectWarning")  # of amount 0
@pytest.mark.parametrize(("sparsity", "ratio"), [(0.0, 1.02), (0.5, 0.56), (0.9, 0.15), (0.99, 0.06)])
def test_a_sparse_file_is_small(sparsity: float, ratio: float, tmp_path: Path) -> None:
    model = LeNet(channels=(16, 32), hidden=(240, 84))
    if sparsity:
        prune_weights(model, sparsity)
    save_pruned(model, tmp_path / "file")
    assert (tmp_path / "file").stat().st_size <= ratio * 4 * sum(p.numel() for p in model.parameters())
    assert_same_state(load_pruned(tmp_path / "file", LeNet(channels=(16, 32), hidden=(240, 84))), model)


def test_a_dense_file_is_plain_safetensors(tmp_path: Path) -> None:
    model = build(resnet)
    save_pruned(model, tmp_path / "file")
    stored = load_file(tmp_path / "file")
    assert set(stored) == set(model.state_dict())
    assert all(torch.equal(stored[name], tensor) for name, tensor in model.state_dict().items())


def test_a_file_that_exists_is_replaced(tmp_path: Path) -> None:
    model = build(Literal)
    save_pruned(model, tmp_path / "file")
    prune_neurons(model, inputs((3, 8, 8)), 0.5)
    save_pruned(model, tmp_path / "file")
    assert_same_state(load_pruned(tmp_path / "file", Literal().double()), model)


def test_a_pruned_model_can_be_loaded_into_one_of_its_own_size(tmp_path: Path) -> None:
    """Its patches are there already; loading twice changes nothing."""
    model = build(Literal)
    prune_neurons(model, inputs((3, 8, 8)), 0.5)
    save_pruned(model, tmp_path / "file")
    twin = copy.deepcopy(model)
    nn.init.zeros_(twin.fc.weight)
    for _ in range(2):
        load_pruned(tmp_path / "file", twin)
        assert_same_state(twin, model)
        assert as_strings(twin) == as_strings(model)


def test_buffers_beside_the_state_dict_are_kept_where_they_were_pruned(tmp_path: Path) -> None:
    """A cache that the forward has filled meanwhile is none of our business."""

    def make(cached: int) -> nn.Module:
        buffers = {"scale": torch.rand(8), "cache": torch.rand(cached)}
        return Net(lambda n, x: n.b(n.a(x) * n.scale), a=nn.Linear(3, 8), b=nn.Linear(8, 2), transient=buffers)

    model, fresh = build(lambda: make(5)), build(lambda: make(3), seed=1)
    prune_neurons(model, inputs((3,)), 0.5)
    save_pruned(model, tmp_path / "file")
    load_pruned(tmp_path / "file", fresh)
    assert torch.equal(fresh.scale, model.scale)
    assert len(fresh.cache) == 3
    assert_same_outputs(fresh, model, inputs((3,)))


def test_what_is_no_tensor_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    class Talkative(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"words": 3}

        def set_extra_state(self, state: Any) -> None:
            raise AssertionError

    with pytest.raises(PruningError, match=r"'_extra_state' in the state dict of Talkative is no tensor but dict"):
        save_pruned(Talkative(2, 2), tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_training_goes_on_after_loading(tmp_path: Path) -> None:
    model = build(resnet)
    prune_neurons(model, inputs((3, 8, 8)), 0.5)
    save_pruned(model, tmp_path / "file")
    fresh = load_pruned(tmp_path / "file", resnet().double())
    for net in (model, fresh):
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        net.train()(inputs((3, 8, 8), 4)).square().sum().backward()
        optimizer.step()
    assert_same_state(fresh, model)


# Files that are no good


def refused(path: Path, fresh: nn.Module, match: str | None = None) -> None:
    snapshot = Snapshot(fresh)
    with pytest.raises(PruningError, match=match):
        load_pruned(path, fresh)
    snapshot.assert_unchanged()


def saved_literal(path: Path) -> bytes:
    model = build(Literal)
    prune_neurons(model, inputs((3, 8, 8)), 0.5)
    prune_weights(model, 0.6)
    save_pruned(model, path)
    return path.read_bytes()


def fresh_literal() -> nn.Module:
    return build(Literal, seed=5)


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    for path in (tmp_path / "missing" / "a.safetensors", tmp_path / "file" / "a.safetensors", tmp_path):
        with pytest.raises(PruningError, match="can't write"):
            save_pruned(nn.Linear(2, 2), path)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    data = saved_literal(path)
    for length in [*range(0, 16), *range(16, len(data), 41), len(data) - 1]:
        path.write_bytes(data[:length])
        refused(path, fresh_literal())


def test_a_flipped_bit_anywhere_is_noticed(tmp_path: Path) -> None:
    """In the header, in a name, in a weight: never another model than the one that was saved."""
    path = tmp_path / "file"
    data = saved_literal(path)
    for place in range(0, len(data), 7):
        flipped = bytearray(data)
        flipped[place] ^= 1 << (place % 8)
        path.write_bytes(flipped)
        fresh = fresh_literal()
        snapshot = Snapshot(fresh)
        with pytest.raises(PruningError):
            load_pruned(path, fresh)
        snapshot.assert_unchanged()


@pytest.mark.parametrize(
    "data",
    [b"", b"\0" * 100, b"garbage" * 50, struct.pack("<Q", 2) + b"{}", struct.pack("<Q", 2**60) + b"{}"],
    ids=["empty", "zeros", "text", "empty_header", "huge_header"],
)
def test_garbage_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(data)
    refused(tmp_path / "file", fresh_literal(), "no safetensors file|not written by save_pruned")


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    torch.save(Literal().state_dict(), tmp_path / "file")
    refused(tmp_path / "file", fresh_literal(), "no safetensors file")


def test_somebody_elses_safetensors_file_is_refused(tmp_path: Path) -> None:
    save_file(fresh_literal().state_dict(), tmp_path / "file")
    refused(tmp_path / "file", fresh_literal(), "was not written by save_pruned")
    save_file(fresh_literal().state_dict(), tmp_path / "file", {"lightning_prune": "999"})
    refused(tmp_path / "file", fresh_literal(), "was not written by save_pruned")


CONTENT = {"shapes": {}, "aliases": {}, "patches": [], "transient": []}


@pytest.mark.parametrize(
    "content",
    [
        None, "not json", "3", "[]", "{}", json.dumps(CONTENT | {"shapes": []}), json.dumps(CONTENT | {"shapes": None}),
        json.dumps(CONTENT | {"aliases": {"a": "b"}}), json.dumps(CONTENT | {"patches": [{}]}),
        json.dumps(CONTENT | {"patches": 3}), json.dumps(CONTENT | {"transient": ["fc.bias"]}),
        json.dumps(CONTENT | {"shapes": {"fc.bias": ["x"]}}), json.dumps(CONTENT | {"shapes": {"fc.bias": [5]}}),
        json.dumps(CONTENT | {"shapes": {"no.such": [5]}}),
    ],
)  # fmt: skip
def test_content_that_makes_no_sense_is_refused(content: str | None, tmp_path: Path) -> None:
    state, metadata = fresh_literal().state_dict(), {"lightning_prune": "1"}
    if content is not None:
        metadata |= {"content": content, "checksum": _checksum(content, state)}
    save_file(state, tmp_path / "file", metadata)
    refused(tmp_path / "file", fresh_literal(), "damaged" if content is None else r"damaged: (?!.*checksum)")


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises((PruningError, FileNotFoundError)):
        load_pruned(tmp_path / "none", fresh_literal())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: resnet(), "doesn't fit Sequential: it lacks"),
        (lambda: nn.Linear(3, 4), "doesn't fit Linear: it lacks"),
        (lambda: Net(lambda n, x: x, conv=nn.Conv2d(3, 2, 3), fc=nn.Linear(72, 4)), "can't be pruned to"),
        (lambda: Net(lambda n, x: x, conv=nn.Conv1d(3, 8, 3), fc=nn.Linear(72, 4)), "another architecture"),
        (lambda: Net(lambda n, x: x, conv=nn.Conv2d(3, 8, 3), fc=nn.Linear(72, 4, bias=False)), "in excess"),
    ],
)
def test_another_architecture_is_refused(other: Any, message: str, tmp_path: Path) -> None:
    saved_literal(tmp_path / "file")
    refused(tmp_path / "file", build(other), message)


def test_a_model_that_refuses_its_state_is_put_back(tmp_path: Path) -> None:
    """`load_state_dict` copies in place; what it copied before it failed is put back too."""

    class Picky(Literal):
        def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("not this one")

        def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                self.fc.bias.copy_(state_dict["fc.bias"])
            return super().load_state_dict(state_dict, *args, **kwargs)

    saved_literal(tmp_path / "file")
    fresh = build(Picky, seed=5)
    snapshot = Snapshot(fresh)
    with pytest.raises(RuntimeError, match="not this one"):
        load_pruned(tmp_path / "file", fresh)
    snapshot.assert_unchanged()


def test_a_file_for_another_module_tree_is_refused_with_its_patches(tmp_path: Path) -> None:
    """The tensors fit, the module whose forward holds the size does not exist."""
    inner = build(lambda: Net(lambda n, x: n.deep(x), deep=Literal()))
    prune_neurons(inner, inputs((3, 8, 8)), 0.5)
    save_pruned(inner, tmp_path / "file")

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Literal()

        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return {f"deep.{k}": v for k, v in self.inner.state_dict(*args, **kwargs).items()}

    assert set(Flat().state_dict()) == set(inner.state_dict())
    refused(tmp_path / "file", build(Flat), "no module 'deep'")
