"""The activation functions that a search may choose, by name; a choice of one is plain data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.errors import PruningError

__all__ = [
    "CANDIDATES",
    "DEFAULT_CHOICES",
    "ActivationModule",
    "Candidate",
    "Choice",
    "check_choices",
    "choice_of",
    "register_activation",
    "spread",
]

Value = float | str | tuple[float, ...]
"""Of a parameter: one for all, or one per channel (dimension 1)."""


@dataclass(frozen=True)
class Candidate:
    """An activation function.

    Attributes:
        name: What it is called.
        function: ``function(x, **parameters)``, not in place.
        module: The torch module that is the same, called with ``parameters``; None: torch has none.
        parameters: Their names and what they are unless asked for otherwise.
        emits: The counted function that ``module`` calls; None: none of those that are counted as activations.
        inplace: Whether ``module`` takes ``inplace``.
    """

    name: str
    function: Callable[..., Tensor]
    module: type[nn.Module] | None = None
    parameters: Mapping[str, Value] = field(default_factory=dict)
    emits: str | None = None
    inplace: bool = False


def _thresholded_relu(x: Tensor, threshold: float | Tensor = 0.0) -> Tensor:
    if isinstance(threshold, Tensor):
        return torch.where(x > threshold, x, torch.zeros_like(x))
    return F.threshold(x, threshold, 0.0)


def _leaky_relu(x: Tensor, negative_slope: float | Tensor = 0.01) -> Tensor:
    if isinstance(negative_slope, Tensor):
        return torch.where(x > 0, x, x * negative_slope)
    return F.leaky_relu(x, negative_slope)


def _threshold_module(threshold: float = 0.0) -> nn.Module:
    return nn.Threshold(threshold, 0.0)


_IN_PLACE = {"inplace": True}

_ALL = [
    # Nair & Hinton, 2010.
    Candidate("relu", F.relu, nn.ReLU, emits="relu", inplace=True),
    # Maas et al., 2013.
    Candidate("leaky_relu", _leaky_relu, nn.LeakyReLU, {"negative_slope": 0.01}, "leaky_relu", True),
    # Clevert et al., 2016, arXiv:1511.07289.
    Candidate("elu", F.elu, nn.ELU, {"alpha": 1.0}, "elu", True),
    # Barron, 2017, arXiv:1704.07483.
    Candidate("celu", F.celu, nn.CELU, {"alpha": 1.0}, "celu", True),
    # Klambauer et al., 2017, arXiv:1706.02515.
    Candidate("selu", F.selu, nn.SELU, {}, "selu", True),
    # Hendrycks & Gimpel, 2016, arXiv:1606.08415.
    Candidate("gelu", F.gelu, nn.GELU, {"approximate": "none"}, "gelu"),
    # Elfwing et al., 2018, arXiv:1702.03118; Ramachandran et al., 2017, arXiv:1710.05941.
    Candidate("silu", F.silu, nn.SiLU, {}, "silu", True),
    # Ramachandran et al., 2017: swish with its beta.
    Candidate("swish", lambda x, beta=1.0: x * torch.sigmoid(beta * x), None, {"beta": 1.0}, "sigmoid"),
    # Misra, 2019, arXiv:1908.08681.
    Candidate("mish", F.mish, nn.Mish, {}, "mish", True),
    # Howard et al., 2019, arXiv:1905.02244.
    Candidate("hardswish", F.hardswish, nn.Hardswish, {}, "hardswish", True),
    Candidate("hardsigmoid", F.hardsigmoid, nn.Hardsigmoid, {}, "hardsigmoid", True),
    Candidate("tanh", torch.tanh, nn.Tanh, {}, "tanh"),
    Candidate("sigmoid", torch.sigmoid, nn.Sigmoid, {}, "sigmoid"),
    Candidate("softplus", F.softplus, nn.Softplus, {"beta": 1.0, "threshold": 20.0}, "softplus"),
    Candidate("softsign", F.softsign, nn.Softsign, {}, "softsign"),
    Candidate("tanhshrink", F.tanhshrink, nn.Tanhshrink, {}, "tanhshrink"),
    # Sandler et al., 2018, arXiv:1801.04381.
    Candidate("relu6", F.relu6, nn.ReLU6, {}, "hardtanh", True),
    Candidate("hardtanh", F.hardtanh, nn.Hardtanh, {"min_val": -1.0, "max_val": 1.0}, "hardtanh", True),
    # Sitzmann et al., 2020, arXiv:2006.09661.
    Candidate("sine", torch.sin),
    # So et al., 2021, arXiv:2109.08668.
    Candidate("squared_relu", lambda x: F.relu(x).square(), emits="relu"),
    # Konda et al., 2015, arXiv:1402.3337: x where it is above a threshold, else 0.
    Candidate("thresholded_relu", _thresholded_relu, None, {"threshold": 0.0}, "threshold"),
    # The same without the step: max(x - t, 0).
    Candidate("shifted_relu", lambda x, shift=0.0: F.relu(x - shift), None, {"shift": 0.0}, "relu"),
    Candidate("identity", lambda x: x, nn.Identity),
]

CANDIDATES: dict[str, Candidate] = {candidate.name: candidate for candidate in _ALL}
"""All that can be asked for by name."""

DEFAULT_CHOICES = ("relu", "leaky_relu", "elu", "gelu", "silu", "tanh", "sigmoid", "hardswish", "identity")

LEARNED = {"leaky_relu": "negative_slope", "swish": "beta", "shifted_relu": "shift"}
"""Candidates with a parameter that has a gradient, and its name."""


def register_activation(name: str, function: Callable[[Tensor], Tensor]) -> Candidate:
    """Make an activation function of one's own known to the search, and to what loads its result.

    Args:
        name: A new name.
        function: Elementwise, not in place, importable (it may be pickled with the model).

    Raises:
        PruningError: The name is taken by another function.
    """
    known = CANDIDATES.get(name)
    if known is not None and known.function is not function:
        raise PruningError(f"there is an activation {name!r} already")
    return CANDIDATES.setdefault(name, Candidate(name, function))


def check_choices(choices: Any) -> tuple[str, ...]:
    """Names of candidates as a tuple without repetitions.

    Raises:
        PruningError: There are none, or one is unknown; the message lists the known.
    """
    listed = (choices,) if isinstance(choices, str) else choices
    if not isinstance(listed, Sequence) or not listed:
        raise PruningError(f"choices must be names of activations, got {choices!r}; allowed: {', '.join(CANDIDATES)}")
    unknown = [name for name in listed if not isinstance(name, str) or name not in CANDIDATES]
    if unknown:
        raise PruningError(f"unknown activation {unknown[0]!r}; allowed: {', '.join(CANDIDATES)}")
    return tuple(dict.fromkeys(listed))


@dataclass(frozen=True)
class Choice:
    """An activation function with its parameters; calling it applies it.

    Attributes:
        name: Of the candidate.
        parameters: Those that differ from the candidate's own; several values of one are per channel.
    """

    name: str
    parameters: tuple[tuple[str, Value], ...] = ()

    def __call__(self, x: Tensor) -> Tensor:
        """The function of ``x``.

        Shape: the same as ``x``; per-channel parameters are along dimension 1.
        """
        if not self.parameters:
            return CANDIDATES[self.name].function(x)
        values = {name: _along_channels(value, x) for name, value in self.parameters}
        return CANDIDATES[self.name].function(x, **values)

    def module(self, *, inplace: bool = False) -> nn.Module:
        """The plain torch module that does the same, where there is one."""
        candidate = CANDIDATES[self.name]
        per_channel = any(isinstance(value, tuple) for _, value in self.parameters)
        if self.name == "thresholded_relu" and not per_channel:
            return _threshold_module(**dict(self.parameters))  # type: ignore[arg-type]
        if candidate.module is None or per_channel:
            return ActivationModule(self)
        flags = _IN_PLACE if inplace and candidate.inplace else {}
        return candidate.module(**dict(self.parameters), **flags)

    @property
    def emits(self) -> str | None:
        """The counted function that its module calls."""
        per_channel = any(isinstance(value, tuple) for _, value in self.parameters)
        replaced = per_channel and self.name in ("leaky_relu", "thresholded_relu")  # made of torch.where then
        return None if replaced else CANDIDATES[self.name].emits

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in self.parameters}
        return {"name": self.name, "parameters": values}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Choice:
        """From what `to_dict` gave.

        Raises:
            PruningError: The activation or one of its parameters is unknown.
        """
        (name,) = check_choices(data["name"])
        known = CANDIDATES[name].parameters
        for parameter in data["parameters"]:
            if parameter not in known:
                raise PruningError(f"{name} has no parameter {parameter!r}")
        values = {
            each: tuple(map(float, value)) if isinstance(value, list | tuple) else value
            for each, value in data["parameters"].items()
        }
        return cls(name, tuple(values.items()))

    def __str__(self) -> str:
        def text(value: Value) -> str:
            if isinstance(value, tuple):
                return f"{min(value):.3g}…{max(value):.3g}"
            return value if isinstance(value, str) else f"{value:.3g}"

        inside = ", ".join(f"{name}={text(value)}" for name, value in self.parameters)
        return f"{self.name}({inside})" if inside else self.name


def _along_channels(value: Value, x: Tensor) -> Any:
    if not isinstance(value, tuple):
        return value
    # Built at its final shape: a view would count as one of the forward's own where sizes are rewritten.
    nested: Any = list(value)
    for _ in range(x.dim() - 2):
        nested = [[each] for each in nested]
    return x.new_tensor(nested)


class ActivationModule(nn.Module):
    """An activation that torch has no module for, in a plain module without parameters."""

    def __init__(self, choice: Choice) -> None:
        super().__init__()
        self.choice = choice

    def forward(self, x: Tensor) -> Tensor:
        """The function of ``x``, of the same shape."""
        return self.choice(x)

    def extra_repr(self) -> str:
        """What it is."""
        return str(self.choice)


_BY_MODULE = {candidate.module: candidate for candidate in _ALL if candidate.module is not None}


def choice_of(module: nn.Module) -> Choice | None:
    """What activation a module is; None: none that can be put in another's place without a loss.

    ``nn.PReLU`` has parameters that the user's optimizer holds; subclasses may do anything.
    """
    if type(module) is ActivationModule:
        return module.choice
    if type(module) is nn.Threshold:
        return _thresholded(module.threshold) if module.value == 0 else None
    candidate = _BY_MODULE.get(type(module))
    if candidate is None:
        return None
    values = {name: getattr(module, name) for name in candidate.parameters}
    return Choice(candidate.name, tuple((n, v) for n, v in values.items() if v != candidate.parameters[n]))


def _thresholded(threshold: float) -> Choice:
    return Choice("thresholded_relu", (("threshold", threshold),) if threshold else ())


@lru_cache(maxsize=256)
def spread(choice: Choice) -> float:
    """Root mean square of the function of a standard normal variable: what its output is scaled by.

    Numerically, so that an own function has one too. Source: He et al., 2015, arXiv:1502.01852 (the gain of ReLU);
    Klambauer et al., 2017, arXiv:1706.02515.
    """
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    weights = torch.exp(-z.square() / 2)
    scalar = tuple((n, sum(v) / len(v)) if isinstance(v, tuple) else (n, v) for n, v in choice.parameters)
    with torch.no_grad():
        values = Choice(choice.name, scalar)(z)
    return math.sqrt(float((values.square() * weights).sum() / weights.sum()))
