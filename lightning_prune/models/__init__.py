"""The reference network, and the LightningModule that trains any image classifier."""

from lightning_prune.models.classifier import ImageClassifier
from lightning_prune.models.lenet import LeNet

__all__ = ["ImageClassifier", "LeNet"]
