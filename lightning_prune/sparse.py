"""2:4 sparse layers on GPUs that multiply them faster."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from lightning_prune.errors import NoEffectWarning, PruningError

__all__ = ["to_semi_structured"]

DTYPES = (torch.float16, torch.bfloat16)
ROWS, COLUMNS = 32, 64
"""What the sizes of a weight must be multiples of."""


def to_semi_structured(model: nn.Module) -> list[str]:
    """Turn the weights of linear layers that are 2:4 sparse into torch's semi-structured tensors, in place.

    For inference on NVIDIA GPUs from Ampere on, in half precision: there such a layer multiplies up to twice as fast.
    The values don't change. Convolutions stay as they are: torch has no sparse kernel for them.

    Args:
        model: A model on the GPU in float16 or bfloat16, pruned with ``pattern="2:4"``.

    Returns:
        The names of the weights that were turned.

    Raises:
        PruningError: The model is on no such GPU, or in another precision; it is untouched.

    Warns:
        NoEffectWarning: No linear layer is 2:4 sparse with a size that the kernels take.
    """
    layers = {path: m for path, m in model.named_modules() if type(m) is nn.Linear and _is_sparse(m.weight)}
    wrong = [path for path, layer in layers.items() if not layer.weight.is_cuda]
    if wrong:
        raise PruningError(f"2:4 kernels need an NVIDIA GPU, but {wrong[0]!r} is on {layers[wrong[0]].weight.device}")
    wrong = [path for path, layer in layers.items() if torch.cuda.get_device_capability(layer.weight.device) < (8, 0)]
    if wrong:
        raise PruningError("2:4 kernels need a GPU of compute capability 8.0 or more (Ampere)")
    wrong = [path for path, layer in layers.items() if layer.weight.dtype not in DTYPES]
    if wrong:
        kind = str(layers[wrong[0]].weight.dtype).removeprefix("torch.")
        raise PruningError(f"2:4 kernels need float16 or bfloat16, but {wrong[0]!r} is {kind}; call model.half() first")
    fitting = {p: m for p, m in layers.items() if m.out_features % ROWS == 0 and m.in_features % COLUMNS == 0}
    if not fitting:
        warnings.warn(
            f"no linear layer of {type(model).__name__} is 2:4 sparse with outputs in multiples of {ROWS} and inputs "
            f"of {COLUMNS}; prune with pattern='2:4' first",
            NoEffectWarning,
            stacklevel=2,
        )
    turned = {path: torch.sparse.to_sparse_semi_structured(layer.weight.detach()) for path, layer in fitting.items()}
    for path, weight in turned.items():
        fitting[path].weight = nn.Parameter(weight, requires_grad=False)
    return [f"{path}.weight" if path else "weight" for path in turned]


def _is_sparse(weight: Tensor) -> bool:
    if weight.is_sparse or weight.layout is not torch.strided or weight.size(1) % 4:
        return False
    return bool((weight.detach().view(weight.size(0), -1, 4).count_nonzero(-1) <= 2).all())
