"""Example inputs: from what a user writes after ``--input``, from the model itself, or guessed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.errors import PruningError
from lightning_prune.graph.run import as_calls, run_calls, undisturbed
from lightning_prune.graph.tree import tensors

__all__ = ["describe", "find_inputs", "make_inputs"]

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.bool,
    )
}

_SPEC = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<shape>[^:=]+)(?::(?P<dtype>[^:]+))?(?::(?P<range>[^:]+))?")
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})-({_NUMBER})")

SIDES = (224, 32, 28, 64, 299, 96)
"""Of images, in the order in which they are tried."""


def make_inputs(specs: Sequence[str], seed: int = 0) -> Any:
    """Random tensors as described.

    Args:
        specs: One text per tensor: ``[name=]shape[:dtype[:low-high]]``, such as ``1,3,224,224`` or
            ``input_ids=1,128:int64:0-4096`` (the upper end is not reached). Floats are standard normal without a range,
            integers 0 or 1.
        seed: Of the random numbers.

    Returns:
        A dict where they have names, else a tensor or a tuple.

    Raises:
        PruningError: A text is no such description, or only some of them have names.
    """
    generator = torch.Generator().manual_seed(seed)
    made = []
    for spec in specs:
        try:
            made.append(_make(spec, generator))
        except RuntimeError as error:  # torch, of more memory than there is
            raise PruningError(f"an input of {spec!r} can't be made: {error}") from error
    names = [name for name, _ in made]
    if all(names):
        if len(set(names)) < len(names):
            raise PruningError(f"two inputs have one name: {', '.join(map(str, names))}")
        return dict(made)
    if any(names):
        raise PruningError("either all inputs have names (name=shape) or none has")
    return made[0][1] if len(made) == 1 else tuple(tensor for _, tensor in made)


def _make(spec: str, generator: torch.Generator) -> tuple[str | None, Tensor]:
    match = _SPEC.fullmatch(spec.replace(" ", ""))
    if match is None:
        raise PruningError(f"an input is [name=]shape[:dtype[:low-high]], such as 1,3,224,224; got {spec!r}")
    sizes = match["shape"].split(",")
    if not all(size.isdecimal() and int(size) for size in sizes):
        raise PruningError(f"the shape of an input is whole numbers above 0, such as 1,3,224,224; got {spec!r}")
    dtype = DTYPES.get(match["dtype"] or "float32")
    if dtype is None:
        raise PruningError(f"the dtype of an input is one of {', '.join(DTYPES)}; got {match['dtype']!r}")
    shape = [int(size) for size in sizes]
    low, high = _limits(match["range"], spec)
    if dtype == torch.bool:
        if match["range"]:
            raise PruningError(f"an input of dtype bool has no range; got {spec!r}")
        return match["name"], torch.randint(0, 2, shape, generator=generator).bool()
    if dtype.is_floating_point:
        if match["range"] is None:
            return match["name"], torch.randn(shape, generator=generator).to(dtype)
        return match["name"], (torch.rand(shape, generator=generator) * (high - low) + low).to(dtype)
    kinds = torch.iinfo(dtype)
    if not (low.is_integer() and high.is_integer() and kinds.min <= low and high - 1 <= kinds.max):
        raise PruningError(f"the range of an input of dtype {match['dtype']} is two such numbers; got {spec!r}")
    return match["name"], torch.randint(int(low), int(high), shape, generator=generator).to(dtype)


def _limits(text: str | None, spec: str) -> tuple[float, float]:
    if text is None:
        return 0.0, 2.0
    match = _RANGE.fullmatch(text.lower())
    if match is None or not float(match[1]) < float(match[2]):
        raise PruningError(f"the range of an input is low-high, such as 0-4096; got {spec!r}")
    return float(match[1]), float(match[2])


def find_inputs(model: nn.Module, specs: Sequence[str], known: Any = None) -> tuple[Any, str]:
    """Example inputs of a model.

    Args:
        model: Any module.
        specs: What the user wrote; empty: nothing.
        known: What the model's zoo says that it takes, if anything.

    Returns:
        The inputs, and where they are from.

    Raises:
        PruningError: The user's text is wrong, or nobody says what the model takes and a guess doesn't help.
    """
    if specs:
        return make_inputs(specs), "--input"
    example = getattr(model, "example_input_array", None)
    if example is not None:
        return example, "example_input_array"
    if known is not None:
        return known, "the model's usual"
    for inputs in _guesses(model):
        if _takes(model, inputs):
            return inputs, "guessed"
    raise PruningError(
        f"nothing tells what {type(model).__name__} takes: say it with --input, e.g. --input 1,3,224,224"
    )


def _guesses(model: nn.Module) -> list[Tensor]:
    """Inputs that the first layer takes."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return [make_inputs([f"1,{module.in_channels},{side},{side}"]) for side in SIDES]
        if isinstance(module, nn.Conv1d):
            return [make_inputs([f"1,{module.in_channels},{length}"]) for length in (1024, 128)]
        if isinstance(module, nn.Linear):
            return [make_inputs([f"1,{module.in_features}"])]
        if isinstance(module, nn.Embedding):
            return [make_inputs([f"1,16:int64:0-{module.num_embeddings}"])]
    return []


def _takes(model: nn.Module, inputs: Tensor) -> bool:
    """Whether a model runs on them, and gives as many examples as it gets."""
    with undisturbed(model):
        model.eval()
        try:
            outputs = run_calls(model, as_calls(inputs))
        except Exception:  # whatever a forward raises on what it doesn't take is the answer
            return False
    found = tensors(outputs)
    return bool(found) and all(tensor.dim() == 0 or len(tensor) == len(inputs) for tensor in found[:1])


def describe(inputs: Any) -> str:
    """Shapes and dtypes in one line."""
    if isinstance(inputs, Tensor):
        return f"{'×'.join(map(str, inputs.shape)) or 'scalar'} {str(inputs.dtype).removeprefix('torch.')}"
    if isinstance(inputs, dict):
        return ", ".join(f"{name}={describe(value)}" for name, value in inputs.items())
    if isinstance(inputs, tuple | list):
        return ", ".join(map(describe, inputs))
    return str(inputs)
