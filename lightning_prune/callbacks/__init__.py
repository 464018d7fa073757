"""Lightning callbacks: when pruning happens."""

from lightning_prune.callbacks.neuron_pruning import NeuronPruning
from lightning_prune.callbacks.weight_pruning import WeightPruning

__all__ = ["NeuronPruning", "WeightPruning"]
