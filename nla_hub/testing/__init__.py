"""For tests of this package and of plug-ins: tiny random models of the real families, and the checks that an adapter or an
engine must pass. Offline, seconds to run.

>>> from nla_hub.testing import random_pair
>>> pair = random_pair(tmp_path, "llama")          # tmp_path/source, tmp_path/av, tmp_path/ar
>>> nla = NLA.from_pretrained(tmp_path)

>>> from nla_hub.testing import check_adapter, check_engine, random_av
>>> check_adapter(MY_FAMILY, my_random_model)      # my_random_model(vocab_size, *, seed, layers) -> a causal LM
>>> check_engine(MyEngine, random_av(tmp_path, my_random_model))
"""

from nla_hub.testing.checks import check_adapter
from nla_hub.testing.engine_checks import check_engine
from nla_hub.testing.harness import ModelFactory, random_av, random_pair_of
from nla_hub.testing.random_models import (
    ARCHITECTURES,
    CHAT_TEMPLATE,
    D_MODEL,
    LAYER,
    LAYERS,
    MARKER,
    NO_THINKING,
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
    "NO_THINKING",
    "ModelFactory",
    "RandomPair",
    "check_adapter",
    "check_engine",
    "random_av",
    "random_gemma3_wrapper",
    "random_model",
    "random_pair",
    "random_pair_of",
    "random_tokenizer",
    "sidecars",
]
