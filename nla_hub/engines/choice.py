"""Which engine, and what it is told: a name and options -> an engine class, and at last an engine."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nla_hub import registry
from nla_hub.engines.base import Engine, LoadedAV, Reads, StoredAV
from nla_hub.errors import InputError


@dataclass(frozen=True)
class EngineChoice:
    """The engine of a pair.

    Attributes:
        name: "auto" or a registered engine.
        options: keyword-only arguments of the engine's constructor.
    """

    name: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)  # there may be a key among them

    @property
    def type(self) -> type[Engine]:
        """The engine's class.

        Raises:
            UnknownNameError: no engine is registered under this name.
        """
        return registry.engines.get("transformers" if self.name == "auto" else self.name)

    @property
    def reads(self) -> Reads:
        """What its constructor wants to be given; a plug-in that does not say wants modules."""
        return getattr(self.type, "reads", "model")

    def check(self) -> None:
        """Raise an error where the name or an option is unknown, before anything is loaded.

        Raises:
            UnknownNameError: an unknown engine or option. InputError: options that are no mapping.
        """
        engine = self.type
        if not isinstance(self.options, Mapping):
            raise InputError("engine_options is a mapping.", got=repr(self.options)[:80])
        parameters = inspect.signature(engine.__init__).parameters.values()
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return
        known = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
        for name in self.options:
            if name not in known:
                raise registry.unknown(f"option of the engine {engine.name!r}", str(name), known)

    def build(self, av: LoadedAV | StoredAV) -> Engine:
        """The engine on its AV, probed; closed again where the probe fails.

        Raises:
            InjectionError: the engine cannot inject this way, or the vector does not reach the logits.
        """
        self.check()
        engine = self.type(av, **self.options)
        try:
            engine.probe()
        except BaseException:
            engine.close()
            raise
        return engine
