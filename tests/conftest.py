"""Random pairs of every family, built once a session; nothing here goes online."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import settings
from parity import ReferenceAR, ReferenceAV, ReferenceSource

from nla_hub import NLA
from nla_hub.testing import ARCHITECTURES, D_MODEL, RandomPair, random_pair

torch.set_num_threads(1)
transformers.logging.disable_progress_bar()
settings.register_profile("suite", deadline=None, max_examples=50, derandomize=True, database=None)
settings.load_profile("suite")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Captured output as plain UTF-8: several tests write half characters, and reports travel between processes."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


@dataclass(frozen=True)
class Spec:
    """One kind of pair."""

    architecture: str
    bos: bool = True
    wrapper: bool = False
    kind: str = "overwrite"

    def __str__(self) -> str:
        extras = [
            word for word, on in (("nobos", not self.bos), ("wrapper", self.wrapper), ("add", self.kind == "add")) if on
        ]
        return "-".join([self.architecture, *extras])


CROSSED = ("qwen2", "llama", "gemma3")
"""The families of the released pairs: with and without BOS, both kinds. What these two do to a model does not depend on its
family, so the others come with BOS and `overwrite` alone (and once with `add`, in test_architectures.py)."""

SPECS = [
    *(Spec(architecture, bos=bos) for architecture in CROSSED for bos in (True, False)),
    *(Spec(architecture, kind="add") for architecture in CROSSED),
    Spec("gemma3", wrapper=True),
    *(Spec(architecture) for architecture in ARCHITECTURES if architecture not in CROSSED),
]


@dataclass
class Case:
    """A pair on disk, the loaded NLA, and references that share no code with it."""

    spec: Spec
    pair: RandomPair
    nla: NLA

    @cached_property
    def av(self) -> ReferenceAV:
        return ReferenceAV(self.pair.av)

    @cached_property
    def ar(self) -> ReferenceAR:
        return ReferenceAR(self.pair.ar)

    @cached_property
    def source(self) -> ReferenceSource:
        return ReferenceSource(self.pair.source)


@pytest.fixture(scope="session")
def make_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Spec], Case]:
    built: dict[Spec, Case] = {}

    def make(spec: Spec) -> Case:
        if spec not in built:
            root = tmp_path_factory.mktemp(str(spec))
            pair = random_pair(root, spec.architecture, bos=spec.bos, wrapper=spec.wrapper, kind=spec.kind)
            built[spec] = Case(spec, pair, NLA.from_pretrained(root))
        return built[spec]

    return make


@pytest.fixture(scope="session", params=SPECS, ids=str)
def case(request: pytest.FixtureRequest, make_case: Callable[[Spec], Case]) -> Case:
    """Every family, with and without BOS, both kinds of injection, and the multimodal wrapper as a source."""
    return make_case(request.param)


@pytest.fixture(scope="session", params=[s for s in SPECS if not s.wrapper], ids=str)
def speaker(request: pytest.FixtureRequest, make_case: Callable[[Spec], Case]) -> Case:
    """Every kind of AV."""
    return make_case(request.param)


@pytest.fixture(scope="session", params=[s for s in SPECS if s.kind == "overwrite" and s.bos], ids=str)
def family(request: pytest.FixtureRequest, make_case: Callable[[Spec], Case]) -> Case:
    """One pair a family, and the wrapper."""
    return make_case(request.param)


@pytest.fixture(scope="session", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest, make_case: Callable[[Spec], Case]) -> Case:
    """One pair a family."""
    return make_case(Spec(request.param))


@pytest.fixture(scope="session", params=CROSSED)
def crossed(request: pytest.FixtureRequest, make_case: Callable[[Spec], Case]) -> Case:
    """One pair a family of the released pairs, where every family would only cost time."""
    return make_case(Spec(request.param))


@pytest.fixture(scope="session")
def llama(make_case: Callable[[Spec], Case]) -> Case:
    """The plain pair, for what does not depend on the family."""
    return make_case(Spec("llama"))


@pytest.fixture(scope="session")
def without_bos(make_case: Callable[[Spec], Case]) -> Case:
    """A pair whose tokenizer has no BOS."""
    return make_case(Spec("llama", bos=False))


@pytest.fixture
def vectors() -> torch.Tensor:
    """Seven raw vectors with norms from 0.08 to 8e5: whatever is read must have been rescaled."""
    rows = torch.randn(7, D_MODEL, generator=torch.Generator().manual_seed(5))
    return rows * torch.logspace(-2, 5, 7)[:, None]


@pytest.fixture
def copied(llama: Case, tmp_path: Path) -> RandomPair:
    """The plain pair, copied so that a test may damage it."""
    import shutil

    for part in ("source", "av", "ar"):
        shutil.copytree(llama.pair.root / part, tmp_path / part)
    return RandomPair(tmp_path, tmp_path / "source", tmp_path / "av", tmp_path / "ar", llama.pair.site)
