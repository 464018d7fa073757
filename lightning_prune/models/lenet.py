"""LeNet, the reference network: a plain ``nn.Module`` that knows nothing of Lightning or of pruning."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import nn

from lightning_prune.errors import PruningError

__all__ = ["ACTIVATIONS", "LeNet"]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "celu": nn.CELU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "hardswish": nn.Hardswish,
    "identity": nn.Identity,
    "leaky_relu": nn.LeakyReLU,
    "mish": nn.Mish,
    "prelu": nn.PReLU,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "selu": nn.SELU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}
"""The activations that can be asked for by name."""


class LeNet(nn.Sequential):
    """Convolution, activation and 2x2 max pooling per channel count, then linear layers.

    Input ``(batch, *in_shape)``, output ``(batch, num_classes)`` logits. The layers are named ``conv1``,
    ``act1``, ``pool1``, ..., ``flatten``, ``fc1``, ...; the last ``fc`` is the output. By default these are
    the 62 006 parameters, under the names, of the CNN in PyTorch's tutorial *Training a Classifier*.

    Args:
        channels: Output channels of each convolution; may be empty.
        kernel_size: Side of the square kernels (stride 1, no padding): one for all, or one per convolution.
        hidden: Width of each hidden linear layer; may be empty.
        activation: A name in ``ACTIVATIONS``, or a callable that makes a new module, e.g. ``nn.Softsign``.
        in_shape: Channels, height and width of an image.
        num_classes: Number of outputs.

    Raises:
        PruningError: An argument is no positive whole number, the activation is unknown, or the image is too
            small for the layers; the message then shows the arithmetic.

    Example:
        >>> sum(parameter.numel() for parameter in LeNet().parameters())
        62006
        >>> LeNet(channels=[4], kernel_size=3, hidden=[], in_shape=(1, 8, 8))
        LeNet(
          (conv1): Conv2d(1, 4, kernel_size=(3, 3), stride=(1, 1))
          (act1): ReLU()
          (pool1): MaxPool2d(kernel_size=2, stride=2, padding=0, dilation=1, ceil_mode=False)
          (flatten): Flatten(start_dim=1, end_dim=-1)
          (fc1): Linear(in_features=36, out_features=10, bias=True)
        )
    """

    def __init__(
        self,
        channels: Sequence[int] = (6, 16),
        kernel_size: int | Sequence[int] = 5,
        hidden: Sequence[int] = (120, 84),
        activation: str | Callable[[], nn.Module] = "relu",
        in_shape: Sequence[int] = (3, 32, 32),
        num_classes: int = 10,
    ) -> None:
        channels, hidden = _sizes("channels", channels), _sizes("hidden", hidden)
        kernels = [kernel_size] * len(channels) if isinstance(kernel_size, int) else kernel_size
        kernels = _sizes("kernel_size", kernels, length=len(channels))
        depth, height, width = _sizes("in_shape", in_shape, length=3)
        if not _is_size(num_classes):
            raise PruningError(f"LeNet: num_classes must be a positive whole number, got {num_classes!r}.")
        _check_fit(min(height, width), kernels)

        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, (channel, kernel) in enumerate(zip(channels, kernels, strict=True), start=1):
            layers[f"conv{i}"] = nn.Conv2d(depth, channel, kernel)
            layers[f"act{i}"] = _make_activation(activation)
            layers[f"pool{i}"] = nn.MaxPool2d(2)
            depth, height, width = channel, (height - kernel + 1) // 2, (width - kernel + 1) // 2
        layers["flatten"] = nn.Flatten()
        features = depth * height * width
        for i, units in enumerate(hidden, start=1):
            layers[f"fc{i}"] = nn.Linear(features, units)
            layers[f"act{len(channels) + i}"] = _make_activation(activation)
            features = units
        layers[f"fc{len(hidden) + 1}"] = nn.Linear(features, num_classes)
        super().__init__(layers)
        self.num_classes = num_classes


def _sizes(name: str, values: Sequence[int], *, length: int | None = None) -> tuple[int, ...]:
    """Check that ``values`` are ``length`` positive whole numbers."""
    wanted = "positive whole numbers" if length is None else f"{length} positive whole number(s)"
    if not isinstance(values, Sequence) or not all(_is_size(value) for value in values):
        raise PruningError(f"LeNet: {name} must be {wanted}, got {values!r}.")
    if length is not None and len(values) != length:
        raise PruningError(f"LeNet: {name} must be {wanted}, got {len(values)}: {values!r}.")
    return tuple(values)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_fit(size: int, kernels: Sequence[int]) -> None:
    """Follow the shorter side of the image through the convolutions and poolings."""
    start, sums = size, []
    for i, kernel in enumerate(kernels, start=1):
        after = size - kernel + 1
        sums.append(f"conv {i}: {size} - {kernel} + 1 = {after}")
        if after >= 1:
            sums.append(f"pool: {after} // 2 = {after // 2}")
        size = after // 2
        if size < 1:
            raise PruningError(
                f"LeNet: an image side of {start} is too small for these layers: {', '.join(sums)}.\n"
                "Use a larger in_shape, a smaller kernel_size or fewer channels entries."
            )


def _make_activation(activation: str | Callable[[], nn.Module]) -> nn.Module:
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            raise PruningError(
                f"LeNet: unknown activation {activation!r}. Allowed: {', '.join(ACTIVATIONS)}, or a callable."
            )
        return ACTIVATIONS[activation]()
    # A module is callable too, but shared between the layers it would not be one activation per layer.
    if isinstance(activation, nn.Module) or not callable(activation):
        raise PruningError(
            f"LeNet: activation must be a name or a callable that makes a module (nn.ReLU, not nn.ReLU()), "
            f"got {activation!r}."
        )
    layer = activation()
    if not isinstance(layer, nn.Module):
        raise PruningError(f"LeNet: activation made a {type(layer).__name__}, not an nn.Module.")
    return layer
