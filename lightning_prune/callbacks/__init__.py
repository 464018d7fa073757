"""Lightning callbacks: when pruning happens."""

from lightning_prune.callbacks.activation_search import ActivationSearch
from lightning_prune.callbacks.neuron_pruning import NeuronPruning
from lightning_prune.callbacks.weight_pruning import WeightPruning

__all__ = ["ActivationSearch", "NeuronPruning", "WeightPruning"]
