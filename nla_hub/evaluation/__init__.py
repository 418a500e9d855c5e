"""Measuring a pair, or two against each other: protocols, scores with controls, facts, what the source holds, steering.

>>> from nla_hub.evaluation import run_protocol
>>> result = run_protocol(nla, "tiny-eval-v1")
>>> print(result)                # or result.to_dict(), result.to_markdown()
>>> print(compare(nla, other))   # both on the same rows, with paired intervals
"""

from __future__ import annotations

from nla_hub.evaluation.compare import Comparison, compare
from nla_hub.evaluation.gates import Gate, check_gates, parse_gates
from nla_hub.evaluation.protocols import PROTOCOLS, Protocol, get_protocol, overlap, require_disjoint
from nla_hub.evaluation.result import EvalResult
from nla_hub.evaluation.runner import run_protocol
from nla_hub.evaluation.source_check import SourceCheckRow, source_check
from nla_hub.evaluation.steering import SteeringTable, steering_table

__all__ = [
    "PROTOCOLS",
    "Comparison",
    "EvalResult",
    "Gate",
    "Protocol",
    "SourceCheckRow",
    "SteeringTable",
    "check_gates",
    "compare",
    "get_protocol",
    "overlap",
    "parse_gates",
    "require_disjoint",
    "run_protocol",
    "source_check",
    "steering_table",
]
