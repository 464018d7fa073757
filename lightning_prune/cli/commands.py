"""The commands: open, do what a function of the library does, show or write what came of it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.cli import output
from lightning_prune.cli.completion import COMPLETION, completion_script, wanted_shell
from lightning_prune.cli.export import FORMATS, export_model
from lightning_prune.cli.inputs import describe, find_inputs
from lightning_prune.cli.judge import find_data, find_metric
from lightning_prune.cli.models import Loaded, import_object, is_file, load_weights, open_model
from lightning_prune.cli.parser import Parser, one_line_errors, reason_of, theirs
from lightning_prune.errors import NoEffectWarning, PruningError
from lightning_prune.export import save_pruned
from lightning_prune.graph.groups import Groups, find_groups
from lightning_prune.graph.run import as_calls
from lightning_prune.pruning.kernels import shrink_kernels
from lightning_prune.pruning.layers import remove_layers
from lightning_prune.pruning.neurons import prune_neurons
from lightning_prune.pruning.plan import Plan
from lightning_prune.pruning.sensitivity import RATIOS
from lightning_prune.pruning.sensitivity import sensitivity as measure_sensitivity
from lightning_prune.pruning.weights import prune_weights
from lightning_prune.report.build import build_report, compare
from lightning_prune.report.cost import count_cost
from lightning_prune.report.figures import draw_figures
from lightning_prune.report.layers import counts_of, thresholds_of
from lightning_prune.report.report import Moment, Report, timeline_of

__all__ = ["run"]

PROG = "lightning-prune"

MODEL_HELP = (
    "torchvision:NAME, timm:NAME, package.module:NAME, path/to/file.py:NAME, or a file: a Lightning checkpoint "
    "(.ckpt) or what save_pruned wrote (.safetensors)"
)


# -- arguments ---------------------------------------------------------------------------------------------------------


def _add_model(parser: Parser, *names: str) -> None:
    """What says which model is meant, and how it is called."""
    for name in names or ("model",):
        parser.add_argument(name, type=str, help=MODEL_HELP)
    parser.add_argument("--class", type=str, help="for a file: the full-size model that it came from, named as above")
    parser.add_argument(
        "--init", type=dict[str, Any], default={}, help="arguments of the class or function: --init.NAME VALUE, or JSON"
    )
    parser.add_argument(
        "--input",
        action="append",
        metavar="[NAME=]SHAPE[:DTYPE[:LOW-HIGH]]",
        help="what the model takes: 1,3,224,224 or 1,128:int64:0-4096; once for each tensor",
    )
    parser.add_argument("--seed", type=int, default=0, help="of random weights and inputs")


def _add_out(parser: Parser, *, required: bool, help: str) -> None:
    parser.add_argument("--out", type=Path, required=required, help=help)


def _neurons(model: nn.Module, example_inputs: Any, amount: float = 0.0, criterion: str = "l1", **options: Any) -> Plan:
    """Remove neurons.

    Args:
        model: The model.
        example_inputs: What it takes.
        amount: Fraction that goes, [0, 1).
        criterion: What makes a neuron important, as for ``prune_neurons``: a name, or an import path of a function.
        **options: See there.
    """
    return prune_neurons(model, example_inputs, amount, criterion=_criterion(criterion), **options)


def _zeros(model: nn.Module, example_inputs: Any, amount: float = 0.0, criterion: str = "l1", **options: Any) -> None:
    """Set single weights to zero.

    Args:
        model: The model.
        example_inputs: What it takes.
        amount: Fraction that goes, [0, 1).
        criterion: What makes a weight important, as for ``prune_weights``: a name, or an import path of a function.
        **options: See there.
    """
    prune_weights(model, amount, criterion=_criterion(criterion), example_inputs=example_inputs, **options)


def _kernels(model: nn.Module, example_inputs: Any, amount: float = 0.0, **options: Any) -> Plan:
    """Take the outer rings off convolution kernels.

    Args:
        model: The model.
        example_inputs: What it takes.
        amount: Fraction that goes, [0, 1).
        **options: See ``shrink_kernels``.
    """
    return shrink_kernels(model, example_inputs, amount, **options)


def _layers(model: nn.Module, example_inputs: Any, amount: float = 0.0, **options: Any) -> Plan:
    """Remove whole layers.

    Args:
        model: The model.
        example_inputs: What it takes.
        amount: Fraction that goes, [0, 1).
        **options: See ``remove_layers``.
    """
    return remove_layers(model, example_inputs, amount, **options)


def _curves(
    model: nn.Module,
    batches: Any,
    metric: str = "agreement",
    *,
    criterion: str = "l1",
    ratios: Sequence[float] = RATIOS,
    **options: Any,
) -> Any:
    """Mask a growing part of each group and measure.

    Args:
        model: The model.
        batches: Pairs of inputs and targets.
        metric: ``agreement`` with the whole model's own predictions, ``accuracy`` for class indices as targets, or an
            import path of a torchmetrics metric or of a function of outputs and targets.
        criterion: Which neurons go first, as for ``prune_neurons``: a name, or an import path of a function.
        ratios: Fractions of each group, in (0, 1).
        **options: See ``sensitivity``.
    """
    return measure_sensitivity(
        model, batches, find_metric(metric), criterion=_criterion(criterion), ratios=ratios, **options
    )


def _criterion(name: str) -> str | Callable[[Tensor], Tensor]:
    found: str | Callable[[Tensor], Tensor] = import_object(name) if ":" in name else name
    return found


_SKIP: set[str | int] = {"model", "example_inputs", "batches", "optimizer"}

_STEPS: dict[str, Callable[..., Any]] = {"layers": _layers, "kernels": _kernels, "": _neurons, "zeros": _zeros}
"""What ``prune`` does, in this order, by the group of its options."""


def _parser() -> Parser:
    parser = Parser(
        prog=PROG,
        version=import_module("lightning_prune").__version__,  # the package itself stands above all floors
        description="See what of a model can be pruned, prune it, compare, report and export. "
        f"{COMPLETION}=bash prints a script for shell completion.",
    )
    commands = parser.add_subcommands(required=True, dest="command")
    for name, (_, fill, about) in COMMANDS.items():
        command = Parser(description=about)
        fill(command)
        commands.add_subcommand(name, command, help=about)
    return parser


def _plain(arguments: Sequence[str], parser: Parser) -> list[str]:
    """``--exact-only`` is ``--exact_only true``."""
    known, flags = _known(parser)
    result: list[str] = []
    for place, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if name.startswith("--") and name not in known and name.replace("-", "_").replace("__", "--", 1) in known:
            name = name.replace("-", "_").replace("__", "--", 1)
        result.append(name + equals + value)
        following = arguments[place + 1] if place + 1 < len(arguments) else ""
        if name in flags and not equals and following.lower() not in ("true", "false", "yes", "no"):
            result.append("true")
    return result


def _known(parser: Any) -> tuple[set[str], set[str]]:
    """All options of all commands, and those that are true or false."""
    known: set[str] = set()
    flags: set[str] = set()
    for action in parser._actions:
        known |= set(action.option_strings)
        if getattr(action, "_typehint", None) is bool:
            flags |= set(action.option_strings)
        if isinstance(action.choices, dict) and not action.option_strings:
            for command in action.choices.values():
                more, those = _known(command)
                known, flags = known | more, flags | those
    return known, flags


def run(arguments: Sequence[str]) -> int:
    """Parse and do; exit code 0, or 2 after one line on stderr."""
    try:
        with one_line_errors(PROG):
            parser = _parser()
            shell = wanted_shell(arguments)
            if shell is not None:
                print(completion_script(parser, shell))
                return 0
            parsed = parser.parse_args(_plain(arguments, parser))
            command = parsed["command"]
            _seed(parsed[command]["seed"])
            with warnings.catch_warnings(record=True) as warned:  # an error is one line
                warnings.simplefilter("error", NoEffectWarning)
                try:
                    COMMANDS[command][0](parsed[command])
                except NoEffectWarning as warning:
                    raise PruningError(str(warning)) from warning
            for said in dict.fromkeys(reason_of(each.message) for each in warned if isinstance(each.message, Warning)):
                output.note(f"warning: {said}")
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 0
    return 0


def _seed(seed: int) -> None:
    try:
        torch.manual_seed(seed)
    except (ValueError, RuntimeError) as error:
        raise PruningError(f"--seed is a whole number of 64 bits, got {seed}") from error


def _open(options: Any, name: str | None = None) -> Loaded:
    return open_model(name or options["model"], cls=options["class"], init=options["init"])


def _inputs(options: Any, loaded: Loaded) -> tuple[Any, str]:
    inputs, origin = find_inputs(loaded.model, options["input"] or (), loaded.inputs)
    if origin == "guessed":
        output.note(f"input: {describe(inputs)} (guessed; --input says otherwise)")
    return inputs, f"{describe(inputs)} ({origin})"


def _show(options: Any, thing: Any, data: Callable[[], Any]) -> None:
    if options["json"]:
        output.show_json(data())
    else:
        output.show(thing)


def _add_json(parser: Parser) -> None:
    parser.add_argument("--json", type=bool, default=False, help="print JSON instead of tables")


# -- inspect -----------------------------------------------------------------------------------------------------------


def _fill_inspect(parser: Parser) -> None:
    _add_model(parser)
    parser.add_argument("--weights", type=Path, help="values for the model: safetensors or a checkpoint")
    _add_json(parser)


@dataclass(frozen=True)
class Inspection:
    """What can be said of a model before anything is done to it."""

    title: str
    inputs: str
    cost: Any
    groups: Groups
    kinds: Mapping[str, str]

    def left(self) -> tuple[float, float]:
        """Fractions of parameters and MACs that stay when each group keeps one neuron."""
        whole = torch.ones(self.groups.neurons, dtype=torch.bool)
        least = torch.zeros_like(whole)
        least[[numbers.start for numbers in self.groups.ranges]] = True
        macs = self.groups.macs(whole)
        params = self.groups.params(whole)
        return (
            self.groups.params(least) / params if params else 1.0,
            self.groups.macs(least) / macs if macs else 1.0,
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        params, macs = self.left()
        return {
            "model": self.title,
            "input": self.inputs,
            "parameters": self.cost.params,
            "nonzero": self.cost.nonzero,
            "macs": self.cost.macs,
            "bytes": self.cost.bytes,
            "removable": {"neurons": self.groups.neurons, "parameters": 1 - params, "macs": 1 - macs},
            "groups": [
                {
                    "name": group.name,
                    "neurons": group.size,
                    "exact": group.exact,
                    "mixing": list(group.mixing),
                    "slices": [str(each) for each in group.slices],
                }
                for group in self.groups.prunable
            ],
            "frozen": [
                {"name": group.name, "neurons": group.size, "reason": group.frozen} for group in self.groups.frozen
            ],
            "layers": {
                name: {
                    "kind": self.kinds[name],
                    "parameters": each.params,
                    "nonzero": each.nonzero,
                    "macs": each.macs,
                    "bytes": each.bytes,
                }
                for name, each in self.cost.layers.items()
            },
        }

    def lines(self) -> list[Any]:
        """As tables."""
        params, macs = self.left()
        head = [
            f"{self.title}, input {self.inputs}",
            f"{self.cost.params:,} parameters ({self.cost.nonzero:,} not zero), {self.cost.macs:,} MACs, "
            f"{self.cost.bytes / 1e6:,.2f} MB",
            f"At most {1 - params:.1%} of the parameters and {1 - macs:.1%} of the MACs can go with neurons.",
            "",
        ]
        layers = [
            (name or "(itself)", self.kinds[name], f"{each.params:,}", f"{each.macs:,}", f"{each.bytes / 1e3:,.1f}")
            for name, each in self.cost.layers.items()
        ]
        found = [output.table(("layer", "kind", "parameters", "MACs", "kB"), layers)]
        return ["\n".join(head), *found, str(self.groups)]


def _inspect(options: Any) -> None:
    loaded = _open(options)
    if options["weights"]:
        load_weights(loaded.model, options["weights"])
    inputs, described = _inputs(options, loaded)
    cost = count_cost(loaded.model, inputs)
    kinds = {name: type(module).__name__ for name, module in loaded.model.named_modules()}
    found = Inspection(loaded.title, described, cost, find_groups(loaded.model, inputs), kinds)
    if options["json"]:
        output.show_json(found.to_dict())
    else:
        output.show(*found.lines())


# -- prune -------------------------------------------------------------------------------------------------------------


def _fill_prune(parser: Parser) -> None:
    _add_model(parser)
    parser.add_argument("--weights", type=Path, help="values for the model: safetensors or a checkpoint")
    _add_out(parser, required=True, help="the file to write, .safetensors, which load_pruned reads")
    parser.add_argument("--report", type=Path, help="a report to write: .html, .md, .json, .csv or .txt")
    parser.add_argument("--latency", type=bool, default=True, help="measure the time of a forward too")
    _add_json(parser)
    for group, function in _STEPS.items():
        parser.add_function_arguments(function, group or None, skip=_SKIP, sub_configs=False)


def _prune(options: Any) -> None:
    _check_safetensors(options["out"])
    if options["report"] is not None:
        output.check_report(options["report"])
    asked = {group: _step_options(options, group) for group in _STEPS}
    if not any(each["amount"] for each in asked.values()):
        ways = [f"--{group}.amount" if group else "--amount" for group in sorted(_STEPS)]
        raise PruningError(f"nothing is to go: say how much with {', '.join(ways)}")
    loaded = _open(options)
    if options["weights"]:
        load_weights(loaded.model, options["weights"])
    inputs, _ = _inputs(options, loaded)
    model, dense = loaded.model, copy.deepcopy(loaded.model)
    plan = Plan({}, {})
    for group, function in _STEPS.items():
        if asked[group]["amount"]:
            done = function(model, inputs, **asked[group])
            plan = plan.then(done) if isinstance(done, Plan) else plan
    report = compare(dense, model, inputs, plan=plan, title=loaded.title, latency=options["latency"])
    with ExitStack() as files:  # both or none
        save_pruned(model, files.enter_context(output.whole_file(options["out"])))
        if options["report"]:
            report.save(files.enter_context(output.whole_file(options["report"])))
    _show(options, report, report.to_dict)


def _check_safetensors(path: Path) -> None:
    output.check_writable(path)
    if path.suffix.lower() != ".safetensors":
        raise PruningError(f"what is written is a safetensors file: --out must end so, got {path.name!r}")


def _step_options(options: Any, group: str) -> dict[str, Any]:
    """What the user said of one step."""
    if group:
        return dict(options[group])
    return {
        name: options[name] for name in signature(prune_neurons).parameters if name in options and name not in _SKIP
    }


# -- compare and report ------------------------------------------------------------------------------------------------


def _fill_compare(parser: Parser) -> None:
    _add_model(parser, "dense", "pruned")
    _add_out(parser, required=False, help="a report to write: .html, .md, .json, .csv or .txt")
    parser.add_argument("--latency", type=bool, default=True, help="measure the time of a forward too")
    _add_json(parser)


def _compare(options: Any) -> None:
    if options["out"] is not None:
        output.check_report(options["out"])
    names = options["dense"], options["pruned"]
    cls = options["class"] or next((name for name in names if not is_file(name)), None)
    loaded = [open_model(name, cls=cls if is_file(name) else None, init=options["init"]) for name in names]
    inputs, _ = _inputs(options, loaded[0])
    report = compare(
        loaded[0].model,
        loaded[1].model,
        inputs,
        title=f"{loaded[0].title} → {loaded[1].title}",
        latency=options["latency"],
    )
    if options["out"] is not None:
        report.save(options["out"])
    _show(options, report, report.to_dict)


def _fill_report(parser: Parser) -> None:
    _add_model(parser)
    _add_out(parser, required=True, help="the report to write: .html, .md, .json, .csv or .txt")


def _report(options: Any) -> None:
    output.check_report(options["out"])
    if Path(options["model"]).suffix.lower() == ".json":
        report = _saved_report(Path(options["model"]))
    else:
        report = _report_of_file(options)
    report.save(options["out"])
    output.note(f"wrote {options['out']}")


def _saved_report(path: Path) -> Report:
    import json

    try:
        return Report.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PruningError(f"{path} is no JSON: {error}") from error


def _report_of_file(options: Any) -> Report:
    loaded = _open(options)
    inputs, _ = _inputs(options, loaded)
    if not is_file(options["model"]):
        raise PruningError(f"a report is of a file of values, {options['model']!r} is none; `inspect` shows a model")
    if loaded.dense is not None:  # its values are not those of then: sizes and times alone can be compared
        report = compare(loaded.dense, loaded.model, inputs, title=loaded.title)
        return replace(report, weights=tuple(replace(each, dense=(), threshold=None) for each in report.weights))
    monitor, value = _monitored(loaded.state, Path(options["model"]))
    calls = as_calls(inputs)
    timeline = _timeline(loaded.state)
    report = build_report(
        loaded.model,
        loaded.plan or Plan({}, {}),
        calls,
        (),
        metric=monitor or "monitored metric",
        dense_value=None,
        pruned_value=value,
        activations=loaded.activations,
        timeline=timeline,
        before=next((found for each in _states(loaded.state) if (found := counts_of(each.get("before", {})))), {}),
        thresholds={
            name: value
            for each in _states(loaded.state)
            for name, value in thresholds_of(each.get("thresholds", {})).items()
        },
    )
    return replace(report, title=loaded.title)


def _timeline(checkpoint: Mapping[str, Any]) -> list[Moment]:
    """What the callback that knows most has recorded."""
    return max((timeline_of(state.get("timeline", ())) for state in _states(checkpoint)), key=len, default=[])


def _states(checkpoint: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Of the callbacks in a checkpoint."""
    states = checkpoint.get("callbacks", {})
    return [each for each in states.values() if isinstance(each, Mapping)] if isinstance(states, Mapping) else []


def _monitored(checkpoint: Mapping[str, Any], path: Path) -> tuple[str, float | None]:
    """The metric by which a ModelCheckpoint has kept this very file, where one has."""
    for state in _states(checkpoint):
        if not isinstance(state.get("best_k_models"), Mapping):
            continue
        scores = {Path(name).name: score for name, score in state["best_k_models"].items()}
        score = scores.get(path.name)
        if state.get("monitor") and isinstance(score, int | float | Tensor):
            return str(state["monitor"]), float(score)
    return "", None


# -- sensitivity -------------------------------------------------------------------------------------------------------


def _fill_sensitivity(parser: Parser) -> None:
    _add_model(parser)
    parser.add_argument("--weights", type=Path, help="values for the model: safetensors or a checkpoint")
    parser.add_argument(
        "--data",
        type=str,
        help="import path of a LightningDataModule, a DataLoader, or a function that gives pairs of inputs and targets "
        "(default: 4 random batches, with the whole model's own predictions as targets)",
    )
    parser.add_argument("--batches", type=int, default=8, help="use so many batches of the data; 0 for all")
    _add_out(parser, required=False, help="a figure to write: .png, .svg or .pdf")
    _add_json(parser)
    parser.add_function_arguments(_curves, skip=_SKIP, sub_configs=False)


def _sensitivity(options: Any) -> None:
    if options["out"] is not None:
        output.check_figure(options["out"])
    loaded = _open(options)
    if options["weights"]:
        load_weights(loaded.model, options["weights"])
    inputs, _ = _inputs(options, loaded)
    batches = find_data(options["data"], loaded.model, inputs, options["batches"])
    own = ("metric", "criterion", "ratios", "include", "exclude", "progress")
    with theirs(f"measuring {loaded.title}"):
        found = _curves(loaded.model, batches, **{name: options[name] for name in own if name in options})
    if options["out"] is not None:
        with output.whole_file(options["out"]) as temporary:
            draw_figures(Report((), sensitivity=found))["sensitivity"].savefig(temporary)
    _show(options, str(found), found.to_dict)


# -- export ------------------------------------------------------------------------------------------------------------


def _fill_export(parser: Parser) -> None:
    _add_model(parser)
    parser.add_argument("--weights", type=Path, help="values for the model: safetensors or a checkpoint")
    parser.add_argument("--format", choices=list(FORMATS), help="default: what the file's ending says")
    parser.add_argument("--dynamic_batch", type=bool, default=False, help="take any number of examples at once")
    _add_out(parser, required=True, help="the file to write")


def _export(options: Any) -> None:
    output.check_writable(options["out"])
    loaded = _open(options)
    if options["weights"]:
        load_weights(loaded.model, options["weights"])
    form = options["format"] or next((name for name, end in FORMATS.items() if options["out"].suffix == end), None)
    if form is None:
        raise PruningError(f"--format is one of {', '.join(FORMATS)}; the ending of {options['out'].name} says none")
    inputs = None if form == "safetensors" else _inputs(options, loaded)[0]
    said = export_model(loaded.model, inputs, options["out"], form, dynamic=options["dynamic_batch"])
    output.note(f"wrote {options['out']}{said}")


COMMANDS: dict[str, tuple[Callable[[Any], None], Callable[[Parser], None], str]] = {
    "inspect": (_inspect, _fill_inspect, "what a model costs, layer by layer, and which neurons of it can go"),
    "prune": (_prune, _fill_prune, "prune a model at once and save it"),
    "compare": (_compare, _fill_compare, "set two models side by side, the dense one first"),
    "report": (_report, _fill_report, "write a report of a pruned checkpoint"),
    "sensitivity": (_sensitivity, _fill_sensitivity, "how much a model suffers when a part of a group is masked"),
    "export": (_export, _fill_export, "write a model for other runtimes, and check what was written"),
}
"""By name: what does it, what gives it its options, and what it does in words."""
