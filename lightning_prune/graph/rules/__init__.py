"""What every ATen operation does to labels. One table (`table.py`), filled by one file per family."""

from lightning_prune.graph.rules.channelwise import reduce
from lightning_prune.graph.rules.contraction import mm
from lightning_prune.graph.rules.elementwise import pointwise
from lightning_prune.graph.rules.movement import keep, move
from lightning_prune.graph.rules.table import Call, Rule, family, find_rule, rule

__all__ = ["Call", "Rule", "family", "find_rule", "keep", "mm", "move", "pointwise", "reduce", "rule"]
