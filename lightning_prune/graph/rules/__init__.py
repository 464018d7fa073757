"""What every ATen operation does to labels. One table (`table.py`), filled by one file per family."""

from lightning_prune.graph.rules import channelwise, contraction, elementwise, movement
from lightning_prune.graph.rules.table import Call, Rule, family, find_rule, rule

__all__ = [
    "Call",
    "Rule",
    "channelwise",
    "contraction",
    "elementwise",
    "family",
    "find_rule",
    "movement",
    "rule",
]
