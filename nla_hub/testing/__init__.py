"""For tests of this package and of plug-ins: tiny random models of the real families. Offline, seconds to build.

>>> from nla_hub.testing import random_pair
>>> pair = random_pair(tmp_path, "llama")          # tmp_path/source, tmp_path/av, tmp_path/ar
>>> nla = NLA.from_pretrained(tmp_path)
"""

from nla_hub.testing.random_models import (
    ARCHITECTURES,
    CHAT_TEMPLATE,
    D_MODEL,
    LAYER,
    LAYERS,
    MARKER,
    RandomPair,
    random_gemma3_wrapper,
    random_model,
    random_pair,
    random_tokenizer,
    sidecars,
)

__all__ = [
    "ARCHITECTURES",
    "CHAT_TEMPLATE",
    "D_MODEL",
    "LAYER",
    "LAYERS",
    "MARKER",
    "RandomPair",
    "random_gemma3_wrapper",
    "random_model",
    "random_pair",
    "random_tokenizer",
    "sidecars",
]
