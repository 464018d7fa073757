"""Lightning callbacks: when pruning happens."""

from lightning_prune.callbacks.activation_search import ActivationSearch
from lightning_prune.callbacks.kernel_shrinking import KernelShrinking
from lightning_prune.callbacks.layer_pruning import LayerPruning
from lightning_prune.callbacks.neuron_pruning import NeuronPruning
from lightning_prune.callbacks.weight_pruning import WeightPruning

__all__ = ["ActivationSearch", "KernelShrinking", "LayerPruning", "NeuronPruning", "WeightPruning"]
