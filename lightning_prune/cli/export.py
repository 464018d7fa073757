"""Exports of the command line: what is written is read again and compared with the model."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_prune.cli.inputs import describe
from lightning_prune.cli.output import whole_file
from lightning_prune.cli.parser import reason_of, theirs
from lightning_prune.errors import PruningError
from lightning_prune.export import save_pruned
from lightning_prune.graph.callsites import ModuleCall
from lightning_prune.graph.run import as_calls
from lightning_prune.graph.tree import tensors

__all__ = ["FORMATS", "export_model"]

FORMATS = {"onnx": ".onnx", "torch-export": ".pt2", "safetensors": ".safetensors"}
"""Names of formats, and how their files end."""

FAR = 1e-3
"""Outputs that differ by so much, relative to the largest, are not the model's."""


def export_model(model: nn.Module, inputs: Any, path: Path, form: str, *, dynamic: bool = False) -> str:
    """Write a model and compare what was written.

    Args:
        model: Any module.
        inputs: Example inputs; not needed for safetensors.
        path: The file; it is written whole or not at all.
        form: One of `FORMATS`.
        dynamic: The first dimension of all inputs may be of any size.

    Returns:
        What to say of it.

    Raises:
        PruningError: The model can't be exported, or the export computes something else; nothing was written.
    """
    if form == "safetensors":
        with whole_file(path) as temporary:
            save_pruned(model, temporary)
        return ""
    (call,) = as_calls(inputs)
    write: Callable[[nn.Module, ModuleCall, Path, Any], list[Tensor]] = _onnx if form == "onnx" else _torch_export
    model.eval()
    shapes = None
    if dynamic:  # a size of 1 would be taken for a constant
        call = ModuleCall("", *(tree_map(_twice, each) for each in (call.args, call.kwargs)))
        shapes = _dynamic_shapes(model, call)
    with torch.no_grad(), theirs(f"{type(model).__name__} on inputs of {describe(inputs)}"):
        expected = tensors(model(*call.args, **call.kwargs))
    with whole_file(path) as temporary, _quiet():
        try:
            got = write(model, call, temporary, shapes)
        except (PruningError, OSError):
            raise
        except Exception as error:  # torch's exporter and onnxruntime raise many kinds
            first: BaseException = error
            while first.__cause__ is not None:
                first = first.__cause__
            raise PruningError(
                f"{type(model).__name__} can't be exported to {form}: {type(first).__name__}: {reason_of(first)}"
            ) from error
        gap = _gap(expected, got)
        if not gap <= FAR:
            raise PruningError(
                f"the {form} file of {type(model).__name__} computes something else: it differs by {gap:.1e} of the "
                "largest output; nothing was written"
            )
    return f"; its outputs differ from the model's by {gap:.1e} of the largest"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporters say of themselves: warnings, logs, graphs on standard error."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _twice(value: Any) -> Any:
    return torch.cat([value, value]) if isinstance(value, Tensor) and value.dim() else value


def _dynamic_shapes(model: nn.Module, call: ModuleCall) -> dict[str, Any]:
    """By the names of forward's arguments: the first dimension of each tensor is of any size."""
    batch = torch.export.Dim("batch", min=1)
    bound = inspect.signature(model.forward).bind(*call.args, **call.kwargs)

    def free(value: Any) -> Any:
        return {0: batch} if isinstance(value, Tensor) and value.dim() else None

    return {name: tree_map(free, value) for name, value in bound.arguments.items()}


def _torch_export(model: nn.Module, call: ModuleCall, path: Path, shapes: Any) -> list[Tensor]:
    program = torch.export.export(model, call.args, call.kwargs, dynamic_shapes=shapes)
    torch.export.save(program, path)
    with torch.no_grad():
        return tensors(torch.export.load(path).module()(*call.args, **call.kwargs))


def _onnx(model: nn.Module, call: ModuleCall, path: Path, shapes: Any) -> list[Tensor]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # torch needs it and says so less well
    except ImportError as error:
        raise PruningError(f'ONNX needs {error.name}: pip install "lightning-prune[export]"') from error
    program = torch.onnx.export(
        model, call.args, kwargs=call.kwargs, dynamo=True, dynamic_shapes=shapes, verbose=False, optimize=True
    )
    if program is None:
        raise PruningError("torch.onnx.export gave nothing")
    program.save(str(path), external_data=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    given = tensors((call.args, call.kwargs))
    names = [each.name for each in session.get_inputs()]
    if len(names) != len(given):
        raise PruningError(f"the ONNX file takes {len(names)} tensors, the model {len(given)}")
    found = session.run(None, {name: each.numpy() for name, each in zip(names, given, strict=True)})
    return [torch.from_numpy(each) for each in found]


def _gap(expected: list[Tensor], got: list[Tensor]) -> float:
    """The largest difference, relative to the largest finite value; infinite where the shapes differ."""
    if [each.shape for each in expected] != [each.shape for each in got]:
        return float("inf")
    pairs = [(a.double(), b.double()) for a, b in zip(expected, got, strict=True) if a.numel()]
    largest = max((float(a[a.isfinite()].abs().max()) for a, _ in pairs if a.isfinite().any()), default=0.0)
    gaps = [torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs()) for a, b in pairs]
    return max((float(gap.max()) for gap in gaps), default=0.0) / (largest or 1.0)
