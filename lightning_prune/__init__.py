"""Pruning callbacks for PyTorch Lightning: masked weights, physically removed neurons, a plain nn.Module."""

from lightning_prune.activations.candidates import register_activation
from lightning_prune.activations.sites import find_activations
from lightning_prune.callbacks import ActivationSearch, KernelShrinking, LayerPruning, NeuronPruning, WeightPruning
from lightning_prune.errors import NoEffectWarning, PruningError, SurgeryError, TraceError
from lightning_prune.export import load_pruned, save_pruned
from lightning_prune.graph.groups import find_groups
from lightning_prune.pruning.kernels import shrink_kernels
from lightning_prune.pruning.layers import remove_layers
from lightning_prune.pruning.neurons import prune_neurons
from lightning_prune.pruning.plan import Plan
from lightning_prune.pruning.prunable import Prunable, load_from_checkpoint
from lightning_prune.pruning.sensitivity import Sensitivity, sensitivity
from lightning_prune.pruning.weights import prune_weights
from lightning_prune.report.build import compare
from lightning_prune.report.cost import count_cost
from lightning_prune.report.report import Report
from lightning_prune.schedulers import create_lr_scheduler, plot_lr, preview_lr
from lightning_prune.sparse import to_semi_structured

__version__ = "0.1.0"

__all__ = [
    "ActivationSearch",
    "KernelShrinking",
    "LayerPruning",
    "NeuronPruning",
    "NoEffectWarning",
    "Plan",
    "Prunable",
    "PruningError",
    "Report",
    "Sensitivity",
    "SurgeryError",
    "TraceError",
    "WeightPruning",
    "compare",
    "count_cost",
    "create_lr_scheduler",
    "find_activations",
    "find_groups",
    "load_from_checkpoint",
    "load_pruned",
    "plot_lr",
    "preview_lr",
    "prune_neurons",
    "prune_weights",
    "register_activation",
    "remove_layers",
    "save_pruned",
    "sensitivity",
    "shrink_kernels",
    "to_semi_structured",
]
