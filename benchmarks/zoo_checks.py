"""The checks of the zoo benchmark: each takes a case, gives what it measured, and raises when it fails."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zoo_models import ZOOS, Entry

from lightning_prune import count_cost, find_groups, prune_neurons

__all__ = ["Options", "columns", "run_one"]

AMOUNT = 0.5
TOLERANCE = 1e-10
EFFECT = 1e-6
"""Other inputs, or zeros in weights, must change outputs by this much, or comparing outputs says nothing."""


@dataclass(frozen=True)
class Options:
    """What to run of a model, and for how long."""

    timeout: float = 180.0
    tp_timeout: float = 120.0
    exact: bool = True
    tp: bool = True
    dense: bool = False


@dataclass
class Case:
    """A model under test, and what has been measured of it."""

    entry: Entry
    model: nn.Module
    record: dict[str, Any] = field(default_factory=dict)
    signature: Any = None
    double: bool = False

    def inputs(self, seed: int = 0) -> Any:
        return self._seeded(self.entry.inputs, 1, seed)

    def train_inputs(self) -> Any:
        return self._seeded(self.entry.train_inputs or self.entry.inputs, 2, 0)  # one has no batch statistics

    def _seeded(self, inputs: Callable[[int], Any], batch: int, seed: int) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            made = inputs(batch)
        if not self.double:
            return made
        return pytree.tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, made)


Check = Callable[[Case], dict[str, Any]]


def require(condition: Any, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def evaluate(model: nn.Module, inputs: Any) -> Any:
    model.eval()
    with torch.no_grad():
        return call(model, inputs)


def signature(outputs: Any, dynamic: bool) -> list[Any]:
    """The structure and the shapes of outputs; of dynamic ones without the first size."""
    leaves, structure = pytree.tree_flatten(outputs)
    shapes = [list(leaf.shape[dynamic:]) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in leaves]
    return [str(structure), shapes]


def floats(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)]


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def peak_mb() -> float:
    """Most memory that this process has held at once; a fork starts at what is held then."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# ------------------------------------------------------------------------------------------------------ the dense model


def dense(case: Case) -> dict[str, Any]:
    """A forward of the dense model: its memory, its time, the shapes to keep."""
    inputs = case.inputs()
    before = peak_mb()
    outputs = evaluate(case.model, inputs)
    memory = peak_mb() - before
    return {
        "forward_mb": memory,
        "forward_s": timed(lambda: evaluate(case.model, inputs))[0],
        "params": parameters(case.model),
        "layers": sum(1 for m in case.model.modules() if next(m.parameters(recurse=False), None) is not None),
        "signature": signature(outputs, case.entry.dynamic),
    }


def cost(case: Case) -> dict[str, Any]:
    return {"macs": count_cost(case.model, case.inputs()).macs}


def randomised(case: Case) -> nn.Module:
    """A copy in double precision: every parameter and norm statistic random, of a scale that keeps values sane."""
    case.double = True
    model = case.entry.double(deepcopy(case.model))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for module in model.modules():
            gain = 2**0.5 if isinstance(module, nn.modules.conv._ConvNd) else 1.0
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() > 1:
                    parameter.normal_(0, gain * (parameter.size(0) / parameter.numel()) ** 0.5)
                elif "bias" in name:
                    parameter.normal_(0, 0.1)
                else:
                    parameter.uniform_(0.5, 1.5)
            if isinstance(getattr(module, "running_var", None), Tensor):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
        if case.entry.dynamic:
            calm(model, case.inputs())
    return model


def calm(model: nn.Module, inputs: Any) -> None:
    """Divide each layer by the spread of its first output, or all boxes of a detector lie outside of the image."""
    divided = set()

    def divide(layer: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if layer in divided or output.numel() < 2:
            return None
        divided.add(layer)
        spread = output.std()
        for parameter in layer.parameters():
            parameter.div_(spread)
        return output / spread

    hooks = [layer.register_forward_hook(divide) for layer in layers(model)]
    evaluate(model, inputs)
    for hook in hooks:
        hook.remove()


def random(case: Case) -> dict[str, Any]:
    """The randomised model in double precision is finite, and depends on its inputs: comparing it means something."""
    case.model = randomised(case)
    one, other = (observe(case.model, case.inputs(seed), case.entry) for seed in (0, 1))
    effect = difference(one, other, case.entry.dynamic)
    require(effect > EFFECT, f"other inputs change outputs by {effect:.1e} only")
    return {"random_effect": effect}


# ----------------------------------------------------------------------------------------------------- the pruned model


def memory(case: Case) -> dict[str, Any]:
    """What `find_groups` needs above the model."""
    inputs = case.inputs()
    before = peak_mb()
    find_groups(case.model.eval(), inputs)
    return {"groups_mb": peak_mb() - before}


def groups(case: Case) -> dict[str, Any]:
    inputs = case.inputs()
    evaluate(case.model, inputs)  # warm up
    spent, found = timed(lambda: find_groups(case.model, inputs))
    require(found.prunable, "nothing is prunable")
    return {
        "groups_s": spent,
        "neurons": sum(group.size for group in found.prunable),
        "prunable": len(found.prunable),
        "frozen": len(found.frozen),
    }


def prune(case: Case) -> dict[str, Any]:
    inputs = case.inputs()
    spent, plan = timed(lambda: prune_neurons(case.model, inputs, AMOUNT, of="neurons", exact_only=False))
    require(plan.kept, "nothing was removed")
    return {"prune_s": spent, "approximate": len(plan.approximate)}


def forward(case: Case) -> dict[str, Any]:
    case.signature = signature(evaluate(case.model, case.inputs()), case.entry.dynamic)
    return {}


def shapes(case: Case) -> dict[str, Any]:
    before = case.record["signature"]
    require(case.signature == before, f"outputs {case.signature[1]}, were {before[1]}")
    return {}


def train(case: Case) -> dict[str, Any]:
    """A forward in training mode."""
    case.model.train()
    with torch.no_grad():
        call(case.model, case.train_inputs())
    return {}


def step(case: Case) -> dict[str, Any]:
    """A training step; the loss is the sum of the means of all outputs, or of the losses that the model gives."""
    case.model.train()
    optimizer = torch.optim.SGD(case.model.parameters(), lr=1e-3)
    loss = sum(output.mean() for output in floats(call(case.model, case.train_inputs())) if output.requires_grad)
    require(isinstance(loss, Tensor), "no output has a gradient")
    loss.backward()
    optimizer.step()
    require(loss.isfinite(), "the loss is not finite")
    return {}


def lower(case: Case) -> dict[str, Any]:
    """Fewer parameters and, where the cost does not depend on values, fewer MACs."""
    after = count_cost(case.model, case.inputs())
    numbers = {"params_after": after.params, "macs_after": after.macs}
    require(after.params < case.record["params"], f"{after.params} parameters, were {case.record['params']}")
    if not case.entry.dynamic:
        require(after.macs < case.record["macs"], f"{after.macs} MACs, were {case.record['macs']}")
    return numbers


def exact(case: Case) -> dict[str, Any]:
    """Removing exactly equals masking: a twin whose removed slices are zero gives the same."""
    model = randomised(case).eval()
    inputs = case.inputs()
    plan = prune_neurons(model, inputs, AMOUNT, of="neurons", exact_only=True)
    require(plan.kept, "nothing was removed")
    pruned = observe(model, inputs, case.entry)
    numbers = {"exact_params": parameters(model)}
    del model
    twin = randomised(case)
    whole = observe(twin, inputs, case.entry)
    mask(twin, plan.kept)
    masked = observe(twin, inputs, case.entry)
    numbers["exact_effect"] = difference(masked, whole, case.entry.dynamic)
    numbers["exact_error"] = error = difference(pruned, masked, case.entry.dynamic)
    require(error <= TOLERANCE, f"differs from the masked twin by {error:.1e}")
    require(numbers["exact_effect"] > EFFECT, f"masking changes outputs by {numbers['exact_effect']:.1e} only")
    return numbers


def mask(model: nn.Module, kept: Mapping[str, Mapping[int, list[int]]]) -> None:
    """Set to zero whatever is not kept, in place."""
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    with torch.no_grad():
        for name, dims in kept.items():
            for dim, index in dims.items():
                gone = torch.ones(tensors[name].size(dim), dtype=torch.bool)
                gone[index] = False
                tensors[name].index_fill_(dim, gone.nonzero().squeeze(1), 0)


def observe(model: nn.Module, inputs: Any, entry: Entry) -> list[Tensor]:
    """All float outputs: of the parts that an entry names (their last call), and of the model."""
    seen: dict[str, list[Tensor]] = {}

    def note(name: str, module: nn.Module, args: Any, outputs: Any) -> None:
        seen[name] = floats(outputs)

    hooks = [model.get_submodule(name).register_forward_hook(partial(note, name)) for name in entry.parts]
    outputs = evaluate(model, inputs)
    for hook in hooks:
        hook.remove()
    return [*(tensor for name in entry.parts for tensor in seen[name]), *floats(outputs)]


def difference(actual: list[Tensor], expected: list[Tensor], dynamic: bool) -> float:
    """The largest difference, relative to the largest value, of any output; dynamic ones may differ in number."""
    require(len(actual) == len(expected), f"{len(actual)} outputs instead of {len(expected)}")
    worst, compared = 0.0, 0
    for a, b in zip(actual, expected, strict=True):
        if a.shape != b.shape and dynamic and a.shape[1:] == b.shape[1:]:
            continue
        require(a.shape == b.shape, f"an output of shape {tuple(a.shape)} instead of {tuple(b.shape)}")
        finite = b.isfinite()
        require(
            torch.equal(finite, a.isfinite()) and torch.equal(a.isnan(), b.isnan()), "not finite in the same places"
        )
        require(finite.any(), "an output is empty or nowhere finite")
        largest = b[finite].abs().max().item()
        distance = (a[finite] - b[finite]).abs().max().item()
        worst, compared = max(worst, distance / largest if largest else distance), compared + 1
    require(compared, "no output to compare")
    return worst


# -------------------------------------------------------------------------------------------------------- torch-pruning


def tp_prune(case: Case) -> dict[str, Any]:
    """As torch-pruning's README does it: half of each layer, all but those that make the output."""
    import torch_pruning as tp

    inputs = case.inputs()
    model = case.model.eval()
    evaluate(model, inputs)  # warm up
    ignored = output_layers(model, inputs)

    def work() -> None:
        importance = tp.importance.GroupMagnitudeImportance(p=1)
        pruner = tp.pruner.BasePruner(model, inputs, importance, pruning_ratio=AMOUNT, ignored_layers=ignored)
        pruner.step()

    spent, _ = timed(work)
    numbers = {"tp_s": spent, "tp_params": parameters(model)}
    require(numbers["tp_params"] < case.record["params"], "nothing was removed")
    return numbers


def output_layers(model: nn.Module, inputs: Any) -> list[nn.Module]:
    """Convolutions and linear layers from which a path leads to the output that meets no other one."""
    made: dict[Any, nn.Module] = {}

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        made[output.grad_fn] = module

    hooks = [layer.register_forward_hook(note) for layer in layers(model)]
    nodes = [output.grad_fn for output in floats(call(model, inputs))]
    for hook in hooks:
        hook.remove()
    found: dict[nn.Module, None] = {}
    seen: set[Any] = {None}
    while nodes:
        node = nodes.pop()
        if node in made:
            found[made[node]] = None
        elif node not in seen:
            seen.add(node)
            nodes += [before for before, _ in node.next_functions]
    return list(found)


# ----------------------------------------------------------------------------------------------------------- run a case


@dataclass(frozen=True)
class Phase:
    """Checks that run one after the other on the same model, in a process of their own.

    Attributes:
        checks: Column -> check.
        needs: Column that must be ok, or the phase is left out.
        theirs: The limit is that of torch-pruning.
    """

    checks: dict[str, Check]
    needs: str = "build"
    theirs: bool = False


_DENSE = Phase({"dense": dense})
_COST = Phase({"cost": cost}, needs="dense")
_TRAIN = Phase({"train": train, "step": step}, needs="dense")
_DOUBLE = Phase({"random": random, "random_step": step}, needs="dense")
_PRUNE = Phase(
    {
        "groups": groups,
        "prune": prune,
        "forward": forward,
        "shapes": shapes,
        "train": train,
        "step": step,
        "lower": lower,
    },
    needs="dense",
)
_MEMORY = Phase({"memory": memory}, needs="groups")
_EXACT = Phase({"exact": exact}, needs="groups")
_TP = Phase({"tp_prune": tp_prune, "tp_forward": forward, "tp_shapes": shapes}, needs="dense", theirs=True)
_REQUIRED = {"dense", "random", "groups", "prune", "forward", "tp_prune", "tp_forward"}
"""Without these the rest of a phase makes no sense."""


def phases(options: Options) -> list[Phase]:
    if options.dense:
        return [_DENSE, _TRAIN, _DOUBLE]
    return [_DENSE, _COST, _PRUNE, _MEMORY, *[_EXACT] * options.exact, *[_TP] * options.tp]


def columns(options: Options) -> list[str]:
    """The names of all checks."""
    return ["build", *(column for phase in phases(options) for column in phase.checks)]


def run_one(zoo: str, name: str, options: Options) -> dict[str, Any]:
    """Build a model and run all checks: what they measured, and a status for each."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    entry = ZOOS[zoo]()[name]
    record: dict[str, Any] = {"zoo": zoo, "model": name}
    torch.manual_seed(0)
    try:
        record["build_s"], model = timed(entry.build)
    except Exception as error:
        return record | {"build": failure(error)}
    record["build"] = "ok"
    for phase in phases(options):
        if record.get(phase.needs) == "ok":
            record |= in_fork(
                phase, Case(entry, model, record), options.tp_timeout if phase.theirs else options.timeout
            )
    record.pop("signature", None)
    return record


def in_fork(phase: Phase, case: Case, limit: float) -> dict[str, Any]:
    """Run a phase in a fork, which has the model at no cost, and may die or take too long."""
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(phase, case, writer))
    process.start()
    writer.close()
    deadline = time.monotonic() + limit
    record: dict[str, Any] = {}
    died = ""
    try:
        while reader.poll(max(0.0, deadline - time.monotonic())):
            record |= reader.recv()
        died = f"took longer than {limit:g} s"
        process.kill()
    except EOFError:
        pass
    process.join()
    if died or process.exitcode:
        missing = next((column for column in phase.checks if column not in record), None)
        if missing:
            record[missing] = f"FAIL: {died or f'ended with exit code {process.exitcode}'}"
    return record


def work(phase: Phase, case: Case, writer: Connection) -> None:
    for column, check in phase.checks.items():
        try:
            numbers = check(case)
        except Exception as error:
            writer.send({column: failure(error)})
            if column in _REQUIRED:
                break
        else:
            case.record |= numbers
            writer.send({column: "ok", **numbers})


def failure(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"FAIL: {type(error).__name__}: {lines[0] if lines else ''}"[:200]
