"""Licences: which, by whom it is said, what files it asks for, and where these are looked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from nla_hub import hub
from nla_hub.errors import HubGatedError, PublishError
from nla_hub.hub import HubOptions, Listing
from nla_hub.locate import Ref
from nla_hub.publish.staging.licences import GEMMA_TERMS, Source, attributions, licence_of, parsed
from nla_hub.training.recipe import load_recipe, recipe_names

ROOT = Path(__file__).resolve().parents[1]
LLAMA = "meta-llama/Llama-3.3-70B-Instruct"
CARD = "---\nlicense: {licence}\nlicense_name: own\nlicense_link: https://own.example/terms\n---\n# Base\n"


class FakeHub:
    """Repositories as mappings of names to bytes; what is asked for is counted."""

    def __init__(self, tmp_path: Path, **repos: Mapping[str, bytes]) -> None:
        self.root, self.repos, self.asked = tmp_path / "cache", repos, 0

    def listing(self, repo: str, *, revision: str | None, options: HubOptions) -> Listing:
        self.asked += 1
        if (files := self.repos.get(repo.rpartition("/")[2])) is None:
            raise HubGatedError("This repository is gated.", next_step="accept its terms")
        return Listing(repo, "0" * 40, {name: len(content) for name, content in files.items()})

    def fetch_files(self, repo: str, names: list[str], **_: Any) -> Path:
        place = self.root / repo
        place.mkdir(parents=True, exist_ok=True)
        for name in names:
            (place / name).write_bytes(self.repos[repo.rpartition("/")[2]][name])
        return place


def connected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **repos: Mapping[str, bytes]) -> FakeHub:
    world = FakeHub(tmp_path, **repos)
    monkeypatch.setattr(hub, "listing", world.listing)
    monkeypatch.setattr(hub, "fetch_files", world.fetch_files)
    return world


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHub:
    """A Hub that shows nothing."""
    return connected(monkeypatch, tmp_path)


# -- the four families -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["Qwen/Qwen2.5-7B-Instruct", "mirror/Qwen2.5-7B-Instruct", "tiny-source"])
def test_apache_brings_its_text(base: str, nobody: FakeHub) -> None:
    licence = licence_of(base)
    assert (licence.id, licence.notice, licence.name_starts_with) == ("apache-2.0", None, None)
    assert licence.files == {"LICENSE": (ROOT / "LICENSE").read_bytes()}
    assert nobody.asked == 0


@pytest.mark.parametrize("base", ["google/gemma-3-12b-it", "google/gemma-3-27b-it"])
def test_gemma_brings_its_notice_and_links(base: str, nobody: FakeHub) -> None:
    licence = licence_of(base)
    assert (licence.id, licence.link) == ("gemma", GEMMA_TERMS)
    notice = licence.files["NOTICE"].decode()
    first = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
    assert notice.splitlines()[0] == first
    assert "https://ai.google.dev/gemma/prohibited_use_policy" in notice
    assert "derived from Gemma" in notice
    assert "were modified" in notice
    assert licence.files.keys() == {"NOTICE"}


def test_llama_takes_its_papers_from_the_base(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    papers = {"LICENSE": b"the licence", "USE_POLICY.md": b"the policy", "model.safetensors": b"x"}
    connected(monkeypatch, tmp_path, **{"Llama-3.3-70B-Instruct": papers})
    licence = licence_of(LLAMA, source=Source(base=Ref("hub", LLAMA)))
    assert (licence.id, licence.notice, licence.name_starts_with) == ("llama3.3", "Built with Llama", "Llama")
    assert licence.files["LICENSE"] == b"the licence"
    assert licence.files["USE_POLICY.md"] == b"the policy"
    assert licence.files["NOTICE"].decode() == (
        "Llama 3.3 is licensed under the Llama 3.3 Community License, Copyright © Meta Platforms, Inc. "
        "All Rights Reserved.\n"
    )


def test_llama_takes_its_papers_from_the_pair_before_the_base(nobody: FakeHub, tmp_path: Path) -> None:
    near, above, base = (tmp_path / name for name in ("av", "pair", "base"))
    for place in (near, above, base):
        place.mkdir()
        (place / "LICENSE.txt").write_bytes(place.name.encode())
    (base / "USE_POLICY.md").write_bytes(b"policy")
    licence = licence_of(LLAMA, source=Source((near, above), Ref("directory", str(base))))
    assert licence.files["LICENSE"] == b"av"
    assert licence.files["USE_POLICY.md"] == b"policy"
    assert nobody.asked == 0


@pytest.mark.parametrize("there", [(), ("LICENSE",), ("USE_POLICY.md",)])
def test_a_missing_licence_file_says_where_it_was_looked_for(
    nobody: FakeHub, tmp_path: Path, there: tuple[str, ...]
) -> None:
    (tmp_path / "av").mkdir()
    for name in there:
        (tmp_path / "av" / name).write_text("x")
    with pytest.raises(PublishError) as refused:
        licence_of(LLAMA, source=Source((tmp_path / "av",), Ref("hub", LLAMA)))
    words = str(refused.value)
    for name in {"LICENSE", "USE_POLICY.md"} - set(there):
        assert name in refused.value.what
    for name in there:
        assert name not in refused.value.what
    assert str(tmp_path / "av") in words
    assert "gated" in words
    assert "copy" in words


# -- who says it -----------------------------------------------------------------------------------------------


def test_the_readme_of_the_base_says_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    readme = {"README.md": CARD.format(licence="other").encode(), "LICENSE": b"own terms"}
    connected(monkeypatch, tmp_path, base=readme)
    licence = licence_of("owner/base", source=Source(base=Ref("hub", "owner/base")))
    assert (licence.id, licence.name, licence.link) == ("other", "own", "https://own.example/terms")
    assert licence.files == {"LICENSE": b"own terms"}
    here = tmp_path / "here"
    here.mkdir()
    (here / "README.md").write_text(CARD.format(licence="gemma"))
    assert licence_of("mine", source=Source(base=Ref("directory", str(here)))).id == "gemma"


def test_nobody_says_it(nobody: FakeHub) -> None:
    with pytest.raises(PublishError, match="--licence"):
        licence_of("owner/base", source=Source(base=Ref("hub", "owner/base")))


def test_the_caller_says_it(nobody: FakeHub, tmp_path: Path) -> None:
    assert licence_of("owner/base", chosen="Apache-2.0").id == "apache-2.0"
    (tmp_path / "LICENSE").write_text("terms")
    own = licence_of("owner/base", chosen="Own-1=https://own.example", source=Source((tmp_path,)))
    assert (own.id, own.name, own.link, own.files) == ("other", "own-1", "https://own.example", {"LICENSE": b"terms"})
    with pytest.raises(PublishError, match="LICENSE"):
        licence_of("owner/base", chosen="mit")
    with pytest.raises(PublishError, match=r"did you mean --licence mit"):
        licence_of("owner/base", chosen="mitt", source=Source((tmp_path,)))


@pytest.mark.parametrize("chosen", ["", "my licence", "other", "unknown", "mitt", "apache", "x=http://plain", "Lösung"])
def test_words_that_name_no_licence(chosen: str) -> None:
    with pytest.raises(PublishError, match="no licence"):
        parsed(chosen)


@pytest.mark.parametrize("base", ["google/gemma-3-12b-it", LLAMA, "owner/base"])
def test_a_binding_licence_is_not_exchanged(base: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    connected(monkeypatch, tmp_path, base={"README.md": CARD.format(licence="llama3.1").encode()})
    with pytest.raises(PublishError, match="binds"):
        licence_of(base, chosen="apache-2.0", source=Source(base=Ref("hub", "owner/base")))


def test_notices_that_lie_there_are_kept(nobody: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "NOTICE.txt").write_text("made by somebody")
    files = licence_of("Qwen/Qwen2.5-7B-Instruct", source=Source((tmp_path,))).files
    assert files.keys() == {"LICENSE", "NOTICE.txt"}


def test_data_sets_of_our_recipes_get_what_they_ask_for() -> None:
    named = {part.data for name in recipe_names() for part in load_recipe(name).data.mix}
    assert named
    for data in named:
        (sentence,) = attributions([data])
        assert "ODC-By" in sentence
        assert data.removeprefix("hf://datasets/") in sentence
    assert len(attributions([*named, *named, "owner/unknown"])) == len(named)
