"""Patterns: which weights may only go together, or must leave neighbours: ``"2:4"``, ``"block:4x4"``. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.errors import PruningError

__all__ = ["Blocks", "NofM", "Pattern", "get_pattern"]


@dataclass(frozen=True)
class NofM:
    """Of every ``m`` weights in a row along the input dimension at least ``n`` stay.

    Source: Mishra et al., 2021, "Accelerating sparse deep neural networks", arXiv:2104.08378 (2:4).
    """

    n: int
    m: int

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def most(self) -> float:
        """The largest amount that the pattern allows."""
        return 1 - self.n / self.m

    def check(self, name: str, shape: tuple[int, ...], inputs: int) -> None:
        """Raise a PruningError if a weight of this shape, its inputs along dimension ``inputs``, can't have it."""
        if shape[inputs] % self.m:
            raise PruningError(
                f"the pattern {self} needs inputs in groups of {self.m}, but {name!r} of shape {shape} has "
                f"{shape[inputs]}; leave it out with exclude"
            )

    def multiple(self, of_inputs: bool) -> int:
        """What the inputs, or the outputs, of a weight must be a multiple of."""
        return self.m if of_inputs else 1

    def units(self, score: Tensor, inputs: int) -> Tensor:
        """Scores of a weight's shape, infinite for those that must stay: the ``n`` highest of each group."""
        rows = score.movedim(inputs, -1)
        groups = rows.reshape(*rows.shape[:-1], -1, self.m)
        # stable, so that of equal scores those of the lower index may go
        order = groups.nan_to_num(nan=torch.inf, neginf=-torch.inf, posinf=torch.inf).argsort(dim=-1, stable=True)
        candidates = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., : self.m - self.n], True)
        limited = torch.where(candidates, groups, torch.inf)
        return limited.reshape(rows.shape).movedim(-1, inputs)

    def spread(self, units: Tensor, shape: tuple[int, ...], inputs: int) -> Tensor:
        """The mask of a weight, given that of its units."""
        return units

    @property
    def size(self) -> int:
        """Weights per unit."""
        return 1


@dataclass(frozen=True)
class Blocks:
    """Weights go in blocks of ``rows`` outputs times ``columns`` inputs; a convolution's, at each place of its kernel.

    Source: Gray et al., 2017, "GPU kernels for block-sparse weights"; Narang et al., 2017, arXiv:1711.02782.
    """

    rows: int
    columns: int

    def __str__(self) -> str:
        return f"block:{self.rows}x{self.columns}"

    most = 1.0

    @property
    def size(self) -> int:
        """Weights per unit."""
        return self.rows * self.columns

    def check(self, name: str, shape: tuple[int, ...], inputs: int) -> None:
        """Raise a PruningError if a weight of this shape, its inputs along dimension ``inputs``, can't have it."""
        rows, columns = shape[1 - inputs], shape[inputs]
        if rows % self.rows or columns % self.columns:
            raise PruningError(
                f"the pattern {self} doesn't fit {name!r} of shape {shape}: {rows} outputs and {columns} inputs "
                f"can't be cut into blocks of {self.rows} and {self.columns}; leave it out with exclude"
            )

    def multiple(self, of_inputs: bool) -> int:
        """What the inputs, or the outputs, of a weight must be a multiple of."""
        return self.columns if of_inputs else self.rows

    def units(self, score: Tensor, inputs: int) -> Tensor:
        """Sums of the scores of each block: (kernel …, outputs / rows, inputs / columns)."""
        return self._cut(score, inputs).sum((-3, -1))

    def spread(self, units: Tensor, shape: tuple[int, ...], inputs: int) -> Tensor:
        """The mask of a weight, given that of its blocks."""
        matrix = units.repeat_interleave(self.rows, -2).repeat_interleave(self.columns, -1)
        return matrix.movedim((-2, -1), (1 - inputs, inputs)).contiguous()

    def _cut(self, score: Tensor, inputs: int) -> Tensor:
        matrix = score.movedim((1 - inputs, inputs), (-2, -1))
        *kernel, rows, columns = matrix.shape
        return matrix.reshape(*kernel, rows // self.rows, self.rows, columns // self.columns, self.columns)


Pattern = NofM | Blocks


def get_pattern(pattern: str | None) -> Pattern | None:
    """Parse a pattern.

    Raises:
        PruningError: It is none.
    """
    if pattern is None:
        return None
    if isinstance(pattern, str):
        if found := re.fullmatch(r"(\d+):(\d+)", pattern):
            n, m = map(int, found.groups())
            if 0 < n < m:
                return NofM(n, m)
        if found := re.fullmatch(r"block:(\d+)x(\d+)", pattern):
            rows, columns = map(int, found.groups())
            if rows > 0 and columns > 0:
                return Blocks(rows, columns)
    raise PruningError(f"pattern must be 'n:m' with 0 < n < m, such as '2:4', or 'block:RxC', got {pattern!r}")
