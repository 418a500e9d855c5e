"""A named pair. Real ones name repositories on the Hub; this one writes random weights into a cache on first use."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

VERSION = "0.1.0"
"""Part of the cache's path, so that a newer version does not find an older one's weights."""


def pairs() -> Mapping[str, Mapping[str, Any]]:
    """What the entry point lists: the keys are those of nla-hub's zoo.yaml."""
    root = _weights()
    return {
        "example-olmo2": {
            "summary": "Random weights of the OLMo 2 family, to show how a plug-in adds a pair; what it writes means nothing.",
            "av": root / "av",
            "ar": root / "ar",
            "base": root / "source",
            "licence": "apache-2.0",
            "adapter": "olmo2",
        }
    }


def _weights() -> Path:
    """The directory of the weights, made where it is not there yet."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nla-hub-example"
    root = cache / VERSION
    if not root.is_dir():
        from nla_hub.testing import random_pair_of
        from nla_hub_example.family import random_olmo2

        cache.mkdir(parents=True, exist_ok=True)
        made = Path(mkdtemp(dir=cache))
        random_pair_of(made, random_olmo2)
        try:
            made.rename(root)  # complete or not there at all
        except OSError:  # another process was faster
            shutil.rmtree(made)
    return root
