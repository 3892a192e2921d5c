"""When a row leaves: one file a family of criteria."""

from engine.criteria.base import BUILT_IN, Criterion, ExitReading, Swept, make_criterion
from engine.criteria.policy import Policy, log_odds
from engine.criteria.scripted import Scripted

BUILT_IN.update({criterion.name: criterion for criterion in (Policy(), Scripted())})

__all__ = ["BUILT_IN", "Criterion", "ExitReading", "Policy", "Scripted", "Swept", "log_odds", "make_criterion"]
