"""Natural language autoencoders: read activations as text, score the text, steer with it.

    from nla_hub import NLA

    nla = NLA.from_pretrained("tiny")
    print(nla.explain("the cat sat on the"))

Importing this package loads no torch: public names are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nla_hub import errors
    from nla_hub.capture import Activations
    from nla_hub.nla import NLA
    from nla_hub.results import Explanation, Explanations, Scores
    from nla_hub.sidecar import Sidecar, Site
    from nla_hub.steering import SteeringVector

__version__ = "0.1.0"

__all__ = [
    "NLA",
    "Activations",
    "Explanation",
    "Explanations",
    "Scores",
    "Sidecar",
    "Site",
    "SteeringVector",
    "__version__",
    "errors",
]

_HOMES = {
    "NLA": "nla_hub.nla",
    "Activations": "nla_hub.capture",
    "Explanation": "nla_hub.results",
    "Explanations": "nla_hub.results",
    "Scores": "nla_hub.results",
    "Sidecar": "nla_hub.sidecar",
    "Site": "nla_hub.sidecar",
    "SteeringVector": "nla_hub.steering",
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("nla_hub.errors")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
