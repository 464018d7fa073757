"""Networks of one construct each: ``CONSTRUCTS``, filled by the modules beside."""

import importlib
import pkgutil

from constructs.registry import (
    CONSTRUCTS,
    Construct,
    construct,
    conv_net,
    image,
    indices,
    linear_net,
    normal,
    parameter,
    signal,
    tokens,
    vector,
    volume,
)

__all__ = [
    "CONSTRUCTS",
    "Construct",
    "construct",
    "conv_net",
    "image",
    "indices",
    "linear_net",
    "normal",
    "parameter",
    "signal",
    "tokens",
    "vector",
    "volume",
]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"constructs.{_module.name}")
