"""Models by name or from a file. Nothing that a file holds is ever unpickled as code."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lightning_prune.activations.apply import Change
from lightning_prune.cli.parser import Parser, near, reason_of, short, theirs
from lightning_prune.errors import PruningError
from lightning_prune.export import load_pruned
from lightning_prune.pruning.plan import Plan
from lightning_prune.pruning.prunable import Prunable, load_from_checkpoint, read_checkpoint

__all__ = ["Loaded", "import_object", "is_file", "load_weights", "open_model"]

CHECKPOINTS = (".ckpt", ".pt", ".pth", ".bin")
FILES = (*CHECKPOINTS, ".safetensors")

IMAGE = (3, 224, 224)


@dataclass(frozen=True)
class Loaded:
    """A model, and what is known of it.

    Attributes:
        model: The model, in evaluation mode.
        title: What to call it.
        inputs: What it usually takes, where its zoo says so.
        dense: The model that it was pruned from (its values are not those of then), where it comes from a file.
        plan: What was removed, where the file says so.
        activations: What a search has chosen, where the file says so.
        state: The whole checkpoint, where it comes from one.
    """

    model: nn.Module
    title: str
    inputs: Any = None
    dense: nn.Module | None = None
    plan: Plan | None = None
    activations: Mapping[str, Change] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)


def is_file(spec: str) -> bool:
    """Whether a model is meant to come from a file of values."""
    return Path(spec).suffix.lower() in FILES


def open_model(spec: str, *, cls: str | None = None, init: Mapping[str, Any] | None = None) -> Loaded:
    """A model by its name, or from a file.

    Args:
        spec: ``torchvision:NAME``, ``timm:NAME``, ``package.module:NAME``, ``path/to/file.py:NAME``, or a file: a
            Lightning checkpoint, or what `save_pruned` wrote.
        cls: For a file: the class, by the same kind of name, of the full-size model.
        init: Arguments of the class or function.

    Raises:
        PruningError: There is no such thing, or the file is not what it should be.
    """
    init = dict(init or {})
    if not is_file(spec):
        if cls is not None:
            raise PruningError(f"--class goes with a file of values (*{', *'.join(FILES)}), and {spec!r} is none")
        return _build(spec, init)
    path = Path(spec)
    if not path.is_file():
        raise PruningError(f"there is no file {spec}")
    if cls is None:
        raise PruningError(f"{spec} holds values, not code: name the model's class, e.g. --class package.module:Class")
    if path.suffix.lower() == ".safetensors":
        return _from_safetensors(path, cls, init)
    return _from_checkpoint(path, cls, init)


def _build(spec: str, init: Mapping[str, Any]) -> Loaded:
    family, colon, name = spec.rpartition(":")
    if not colon:
        raise PruningError(
            "a model is torchvision:NAME, timm:NAME, package.module:NAME, file.py:NAME or a file of values; "
            f"got {spec!r}{_elsewhere(spec)}"
        )
    if family in _ZOOS:
        return _ZOOS[family](name, init)
    thing = import_object(spec)
    if isinstance(thing, nn.Module):
        if init:
            raise PruningError(f"{spec} is a model already, it takes no --init")
        model = thing
    elif callable(thing):
        model = _call(spec, thing, _arguments(spec, thing, init))
    else:
        raise PruningError(f"{spec} is neither a class nor a function but {type(thing).__name__}")
    return Loaded(model.eval(), name)


def _call(spec: str, make: Callable[..., Any], arguments: Mapping[str, Any]) -> nn.Module:
    with theirs(spec):
        model = make(**arguments)
    if not isinstance(model, nn.Module):
        raise PruningError(f"{spec} gives no nn.Module but {type(model).__name__}")
    return model


def _elsewhere(name: str) -> str:
    """Which zoo has a model of that name, or of one like it."""
    known = {each: f"{family}:{each}" for family in _ZOOS for each in _names(family)}
    same = [f"{family}:{name}" for family in _ZOOS if known.get(name) and name in _names(family)]
    if same:
        return f"; did you mean {' or '.join(same)}?"
    return near(name, known)


def _names(family: str) -> list[str]:
    try:
        zoo = importlib.import_module("torchvision.models" if family == "torchvision" else "timm")
    except ImportError:
        return []
    return list(zoo.list_models())


def _torchvision(name: str, init: Mapping[str, Any]) -> Loaded:
    try:
        from torchvision import models
    except ImportError as error:
        raise PruningError('torchvision is not installed: pip install "lightning-prune[examples]"') from error
    if name not in models.list_models():
        raise PruningError(f"torchvision has no model {name!r}{near(name, models.list_models())}")
    init = {"weights": None, "weights_backbone": None} | dict(init) if _has_backbone(models, name) else init
    model = _call(f"torchvision:{name}", lambda **given: models.get_model(name, **given), init)
    image = torch.randn(1, *_crop(models, name), generator=torch.Generator().manual_seed(0))
    module = type(model).__module__
    if module.startswith("torchvision.models.detection"):
        return Loaded(model.eval(), name, [[image[0].sigmoid()]])
    if module.startswith("torchvision.models.video"):
        return Loaded(model.eval(), name, image[:, :, :112, :112].unsqueeze(2).repeat(1, 1, 16, 1, 1))
    if module.startswith("torchvision.models.optical_flow"):
        return Loaded(
            model.eval(), name, (image[:, :, :128, :128].repeat(1, 1, 1, 2), image[:, :, :128, :128].repeat(1, 1, 1, 2))
        )
    return Loaded(model.eval(), name, image)


def _has_backbone(models: Any, name: str) -> bool:
    return "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters


def _crop(models: Any, name: str) -> tuple[int, int, int]:
    """Size of the images that a torchvision model was made for."""
    try:
        transforms = models.get_model_weights(name).DEFAULT.transforms()
    except (AttributeError, ValueError):
        return IMAGE
    size = getattr(transforms, "crop_size", None) or [224]
    return (3, size[0], size[-1])


def _timm(name: str, init: Mapping[str, Any]) -> Loaded:
    try:
        import timm
    except ImportError as error:
        raise PruningError('timm is not installed: pip install "lightning-prune[examples]"') from error
    if not timm.is_model(name):
        raise PruningError(f"timm has no model {name!r}{near(name, timm.list_models())}")
    model = _call(f"timm:{name}", lambda **given: timm.create_model(name, **given), init)
    size = getattr(model, "pretrained_cfg", {}).get("input_size") or IMAGE
    if "in_chans" in init:
        size = (init["in_chans"], *size[1:])
    return Loaded(model.eval(), name, torch.randn(1, *size, generator=torch.Generator().manual_seed(0)))


_ZOOS: dict[str, Callable[[str, Mapping[str, Any]], Loaded]] = {"timm": _timm, "torchvision": _torchvision}


def import_object(spec: str) -> Any:
    """What ``package.module:name`` or ``path/to/file.py:name`` stands for; the user's own code, which is run.

    Raises:
        PruningError: There is no such module or name, or importing it raised.
    """
    where, _, name = spec.rpartition(":")
    if not where or not name:
        raise PruningError(f"an import path is package.module:name or file.py:name, got {spec!r}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # a console script's path lacks it
    module = _module_of_file(Path(where)) if where.endswith(".py") else _module(where, spec)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            known = [each for each in vars(found) if not each.startswith("_")]
            raise PruningError(f"{where} has no {part!r}{near(part, known)}")
        found = getattr(found, part)
    return found


def _module(name: str, spec: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise PruningError(f"there is no module {error.name!r}, which {spec} names") from error
        raise PruningError(f"importing {name} failed: {error}") from error
    except (ValueError, TypeError) as error:
        raise PruningError(f"{spec!r} is no import path: {error}") from error
    except (Exception, SystemExit) as error:  # whatever a user's module may raise
        raise PruningError(f"importing {name} raised {type(error).__name__}: {reason_of(error)}") from error


def _module_of_file(path: Path) -> Any:
    if not path.is_file():
        raise PruningError(f"there is no file {path}")
    path = path.resolve()
    known = sys.modules.get(path.stem)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return known
    if known is not None:
        raise PruningError(f"{path.name} has the name of a module that is in use, {path.stem}: rename it")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))  # its neighbours, as when it is run
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise PruningError(f"{path} can't be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever a user's module may raise
        del sys.modules[path.stem]
        raise PruningError(f"importing {path.name} raised {type(error).__name__}: {reason_of(error)}") from error
    return module


def _arguments(spec: str, thing: Callable[..., Any], init: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a class or function, checked and made from plain values by its signature.

    What the annotations say is built: ``{"network": "lightning_prune.models.LeNet"}`` gives a LeNet.
    """
    parser = Parser(prog="--init", exit_on_error=False)
    try:
        add = parser.add_class_arguments if isinstance(thing, type) else parser.add_function_arguments
        names = add(thing, fail_untyped=False, sub_configs=False)
        known = {name for name in names if name in init}
        made = instantiate(parser, parser.parse_object({name: init[name] for name in known}))
    except Exception as error:  # jsonargparse, or a constructor of an argument
        raise PruningError(f"{spec}: {short(str(error))}") from error
    rest = {name: value for name, value in init.items() if name not in known}
    if rest and not _takes_any(thing):
        name = next(iter(rest))
        raise PruningError(f"{spec} takes no argument {name!r}{near(name, names)}")
    return {name: made[name] for name in known} | rest


def instantiate(parser: Any, parsed: Any) -> Any:
    """Make the objects of a parsed configuration, as the version of jsonargparse wants to be asked for it."""
    return parser.instantiate(parsed) if hasattr(parser, "instantiate") else parser.instantiate_classes(parsed)


def _takes_any(thing: Callable[..., Any]) -> bool:
    return any(each.kind is each.VAR_KEYWORD for each in inspect.signature(thing).parameters.values())


# -- files -------------------------------------------------------------------------------------------------------------


def _from_safetensors(path: Path, cls: str, init: Mapping[str, Any]) -> Loaded:
    ours = _ours(path)
    loaded = _build(cls, init)
    model = copy.deepcopy(loaded.model)
    if not ours:
        load_weights(model, path)
        return Loaded(model, path.name, loaded.inputs)
    load_pruned(path, model)
    return Loaded(model.eval(), path.name, loaded.inputs, loaded.model)


def _ours(path: Path) -> bool:
    """Whether `save_pruned` wrote a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return "lightning_prune" in (file.metadata() or {})
    except SafetensorError as error:
        raise PruningError(f"{path} is no safetensors file, or it is damaged: {error}") from error


def _from_checkpoint(path: Path, cls: str, init: Mapping[str, Any]) -> Loaded:
    content = read_checkpoint(path)
    if cls.partition(":")[0] in _ZOOS:
        loaded = _build(cls, init)
        _load_state(loaded.model, content, path)
        return Loaded(loaded.model, path.name, loaded.inputs, state=content)
    thing = import_object(cls)
    if not (isinstance(thing, type) and issubclass(thing, nn.Module)):
        raise PruningError(f"--class names a class of modules; {cls} is {type(thing).__name__}")
    if not hasattr(thing, "load_from_checkpoint"):
        loaded = _build(cls, init)
        _load_state(loaded.model, content, path)
        return Loaded(loaded.model, path.name, state=content)
    if not isinstance(content.get("state_dict"), Mapping):
        raise PruningError(f"{path} is no checkpoint of {thing.__name__}: it holds no state_dict")
    arguments = _arguments(cls, thing, init)
    knows: Any = thing  # one of ours remembers what was removed, and how to put it back
    if not issubclass(thing, Prunable):
        knows = type(thing.__name__, (Prunable, thing), {"__module__": thing.__module__})
    with TemporaryDirectory() as folder:
        # What was checked is what is loaded, less the names in it of functions that Lightning would import and call.
        harmless = Path(folder) / path.name
        torch.save(_without_code(content), harmless)
        try:
            model: Any = load_from_checkpoint(knows, harmless, map_location="cpu", **arguments)
        except Exception as error:  # whatever a constructor may raise on hyper-parameters that are not its own
            reason = str(error).replace(str(harmless), str(path))
            if not isinstance(error, PruningError):
                reason = f"{path} is no checkpoint of {thing.__name__}: {reason}"
            elif str(path) not in reason:
                reason = f"{path}: {reason}"
            raise PruningError(reason) from error
    plan, activations = model.pruning_plan, model.activation_plan.activations
    if knows is not thing:
        model.__class__ = thing
        for name in ("pruning_plan", "activation_plan"):
            model.__dict__.pop(name, None)
    return Loaded(model.eval(), path.name, plan=plan, activations=activations, state=content)


def _without_code(content: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's weights, hyper-parameters and callbacks; how LightningCLI would build the module is left out."""
    kept = {
        name: value for name, value in content.items() if name not in ("optimizer_states", "lr_schedulers", "loops")
    }
    given = content.get("hyper_parameters")
    if isinstance(given, Mapping):
        kept["hyper_parameters"] = {
            name: value for name, value in given.items() if name not in ("_instantiator", "_class_path")
        }
    return kept


def load_weights(model: nn.Module, path: Path) -> None:
    """Give a full-size model the values of a file: safetensors, what `save_pruned` wrote, or a checkpoint.

    Raises:
        PruningError: The file is none of these, or doesn't fit; the model is untouched.
    """
    if not path.is_file():
        raise PruningError(f"there is no file {path}")
    if path.suffix.lower() != ".safetensors":
        _load_state(model, read_checkpoint(path), path)
        return
    if _ours(path):
        load_pruned(path, model)
        return
    from safetensors.torch import load_file

    _load_state(model, load_file(path), path)


def _load_state(model: nn.Module, content: Mapping[str, Any], path: Path) -> None:
    state: Any = content.get("state_dict", content)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise PruningError(f"{path} holds no weights: its state dict is not tensors by name")
    expected = model.state_dict()
    prefix = _prefix(set(expected), set(state))
    given = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    missing = sorted(set(expected) - set(given))
    extra = [] if prefix else sorted(set(given) - set(expected))
    wrong = [name for name in expected if name in given and given[name].shape != expected[name].shape]
    kind = type(model).__name__
    if missing or extra:
        what = f"it lacks {missing[0]!r}" if missing else f"it has {extra[0]!r} in excess"
        raise PruningError(f"{path} is not of {kind}: {what} ({len(missing)} lacking, {len(extra)} in excess)")
    if wrong:
        name = wrong[0]
        raise PruningError(
            f"{path} is not of this {kind}: {name!r} has shape {tuple(given[name].shape)} in it and "
            f"{tuple(expected[name].shape)} in the model; a pruned checkpoint needs its LightningModule as --class"
        )
    model.load_state_dict({name: given[name] for name in expected})
    model.eval()


def _prefix(expected: set[str], given: set[str]) -> str:
    """Under which all expected names are found: ``"network."`` where a LightningModule holds the model."""
    if not expected or expected & given:
        return ""
    first = min(expected)
    prefixes = sorted({name.removesuffix(first) for name in given if name.endswith(f".{first}")}, key=len)
    return next((each for each in prefixes if all(each + name in given for name in expected)), "")
