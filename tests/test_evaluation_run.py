"""Protocols run on planted pairs: a random source of the tiny world, and halves that know, ignore or invent."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM

from nla_hub.cli import eval as eval_command
from nla_hub.cli import steer as steer_command
from nla_hub.cli.app import RootGroup
from nla_hub.engines.base import Completion
from nla_hub.errors import InputError
from nla_hub.evaluation import EvalResult, run_protocol, source_check, steering_table, tiny_rows
from nla_hub.evaluation import steering as steering_module
from nla_hub.evaluation.controls import floor_label, gold_label
from nla_hub.evaluation.protocols import PROTOCOLS
from nla_hub.evaluation.source_check import MEMORY_FACTS, memory_rows
from nla_hub.evaluation.steering import cut, edited, find_cases, first_value
from nla_hub.evaluation.tiny_rows import BareSource
from nla_hub.geometry import unit
from nla_hub.locate import parse_name
from nla_hub.nla import NLA
from nla_hub.sampling import vector_hash
from nla_hub.source_text import Encoded
from nla_hub.testing import random_pair, random_tokenizer, sidecars
from nla_hub.tiny import documents
from nla_hub.tiny.labels import label_texts, named_facts
from nla_hub.tiny.tokenizer import build_tokenizer
from nla_hub.verbalizer import Verbalizer

D, LAYER, DOCUMENTS = 64, 1, 60


@dataclass
class PlantedEngine:
    """Writes what it was told for each vector, between the tags unless told otherwise; `drawn` where it samples."""

    texts: dict[str, str] = field(default_factory=dict)
    default: str = "<explanation>next the</explanation>"
    drawn: dict[str, str] = field(default_factory=dict)
    sampled: list[tuple[int, float]] = field(default_factory=list)
    known: torch.Tensor | None = None

    def close(self):
        pass

    def key(self, vector):
        """A vector's hash; that of a known one where they differ by rounding alone (captured in another batch)."""
        if self.known is None:
            return vector_hash(vector)
        off = (self.known - vector).norm(dim=-1)
        near = int(off.argmin())
        return vector_hash(self.known[near] if off[near] <= 1e-4 * vector.norm() else vector)

    def generate(self, vectors, draws, *, temperature, **settings):
        texts = self.texts
        if draws is not None:
            self.sampled.append((len(vectors), temperature))
            texts = texts | self.drawn
        return [Completion((), texts.get(self.key(v), self.default), "tag", torch.zeros(0)) for v in vectors]


@dataclass
class PlantedReconstructor:
    """Gives back the vector it was told for each text; for other texts one fixed direction."""

    sidecar: object
    vectors: dict[str, torch.Tensor] = field(default_factory=dict)

    def reconstruct(self, texts, *, batch_size=32, progress=None):
        other = torch.ones(D)
        return torch.stack([self.vectors.get(t, other) for t in texts]) if texts else torch.empty(0, D)


@dataclass
class World:
    """A planted pair, the rows of its protocol, and their true vectors."""

    nla: NLA
    engine: PlantedEngine
    reconstructor: PlantedReconstructor
    rows: list[tiny_rows.Row]
    vectors: torch.Tensor

    def say(self, texts: list[str]) -> None:
        self.engine.known = self.vectors
        self.engine.texts = {
            vector_hash(v): f"<explanation>{t}</explanation>" for v, t in zip(self.vectors, texts, strict=True)
        }

    def run(self, **changes) -> EvalResult:
        settings = {"documents": DOCUMENTS, "fact_rows": 10, "probe_documents": 60, **changes}
        return run_protocol(self.nla, "tiny-eval-v1", **settings)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny-source")
    docs = documents(300, 0)
    tokenizer = build_tokenizer([d.text for d in docs] + label_texts(docs[:50]))
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=D, num_hidden_layers=3, num_attention_heads=2, head_dim=32,
            num_key_value_heads=2, intermediate_size=96, max_position_embeddings=512, initializer_range=0.15,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    model.save_pretrained(root)
    tokenizer.save_pretrained(root)
    return root


@pytest.fixture(scope="module")
def rows(source: Path) -> tuple[list[tiny_rows.Row], torch.Tensor]:
    """Rows of the protocol (and of a few rare facts) with their vectors."""
    bare = BareSource(source, LAYER)
    tokenizer, limit = tiny_rows.source_tokenizer(bare)
    base = tiny_rows.base_rows(tokenizer, PROTOCOLS["tiny-eval-v1"].changed(documents=DOCUMENTS), limit)
    extra, _ = tiny_rows.extra_rows(
        tokenizer, base, tiny_rows.facts_of_world(), wanted=10, k=2, min_position=10, seed=0, max_length=limit
    )
    found = [*base, *extra]
    return found, tiny_rows.capture_rows(bare, found).vectors


@pytest.fixture
def world(source: Path, rows: tuple[list[tiny_rows.Row], torch.Tensor]) -> World:
    av, ar = (s.with_(d_model=D) for s in sidecars(random_tokenizer(), "random/source", layer=LAYER))
    gold = [gold_label(r.document, r.char) for r in rows[0]]
    # Rows with equal labels share one direction; nearly all labels differ.
    engine, reconstructor = PlantedEngine(), PlantedReconstructor(ar, dict(zip(gold, rows[1], strict=True)))
    nla = NLA(name="planted", av=Verbalizer(engine, av, "planted"), ar=reconstructor, base=parse_name(source))
    made = World(nla, engine, reconstructor, *rows)
    made.say(gold)
    return made


# -- scores and controls -------------------------------------------------------------------------------------


def test_a_planted_perfect_pair_scores_one_and_its_permutation_near_chance(world: World):
    result = world.run(facts=False)
    assert (result.n, result.documents) == (2 * DOCUMENTS, DOCUMENTS)
    assert result.real.fve.value > 0.9
    assert result.ceiling.fve.value == pytest.approx(result.real.fve.value)
    assert result.real.fve.dataset == "tiny-eval-v1+documents=60"
    # A permuted row is another unit vector of the same set: E||u - u'||^2 = 2 x raw variance, so FVE is near -1.
    assert result.permuted.fve.value == pytest.approx(-1.0, abs=0.25)
    assert result.floor.fve.value < result.real.fve.value
    assert result.statuses == {"ok": 2 * DOCUMENTS}
    u = unit(world.vectors[: 2 * DOCUMENTS])
    assert result.reference.raw_variance == pytest.approx(float((u - u.mean(0)).square().sum(-1).mean()))


def test_an_av_that_ignores_its_vector_shows_in_the_pair(world: World):
    world.engine.texts = {}
    result = world.run(facts=False)
    assert result.real.fve.value == pytest.approx(result.permuted.fve.value, abs=1e-9)
    assert result.real.fve.value < 0.1
    assert result.ok == 1.0


def test_rows_without_a_usable_explanation_count_as_orthogonal(world: World):
    world.engine.texts = {
        key: text if i % 2 else "no tags at all" for i, (key, text) in enumerate(world.engine.texts.items())
    }
    result = world.run(facts=False)
    bad = result.statuses["no_tags"]
    assert bad >= DOCUMENTS - 2
    assert result.ok == 1 - bad / result.n
    full, n = result.reference.raw_variance, result.n
    assert result.real.fve.value == pytest.approx(1 - (2 * bad / n) / full, abs=0.02)
    assert result.real.cosine == pytest.approx(1 - bad / n, abs=0.02)
    worst = next(e for e in result.examples if e.choice == "worst")
    assert (worst.status, worst.text, worst.cosine) == ("no_tags", None, None)


def test_sampled_explanations_are_scored_beside_the_greedy_ones_when_asked_for(world: World):
    own = world.vectors[: 2 * DOCUMENTS]
    world.engine.drawn = {vector_hash(v): "no tags at all" for v in own[::2]}
    result = world.run(facts=False, sampled=True)
    assert {temperature for _, temperature in world.engine.sampled} == {1.0}
    assert sum(n for n, _ in world.engine.sampled) == result.n
    assert (result.sampled.what, result.sampled.n) == ("explanations drawn at temperature 1", result.n)
    assert result.statuses == {"ok": result.n}
    assert result.sampled_statuses == {"no_tags": DOCUMENTS, "ok": DOCUMENTS}
    figures = result.figures()
    assert figures["ok_sampled"] == 0.5
    assert figures["fve_sampled"] == pytest.approx(1 - 1 / result.reference.raw_variance, abs=0.02)
    assert figures["fve_sampled"] < figures["fve"]
    assert EvalResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    for shown in (str(result), result.to_markdown()):
        assert "explanations drawn at temperature 1" in shown
        assert f"{DOCUMENTS} no_tags, {DOCUMENTS} ok (50.0% ok)" in shown
    world.engine.drawn = {}
    assert world.run(facts=False, sampled=True).figures()["fve_sampled"] == figures["fve"]


def test_results_from_before_there_were_sampled_figures_still_load(world: World):
    result = world.run(facts=False)
    assert result.figures()["fve_sampled"] is None
    assert result.figures()["ok_sampled"] is None
    assert not world.engine.sampled
    assert "temperature 1" not in str(result)
    data = result.to_dict()
    older = {key: value for key, value in data.items() if not key.startswith("sampled")}
    assert len(older) == len(data) - 2
    assert EvalResult.from_dict(older) == result
    stored = Path(__file__).resolve().parents[1] / "model_cards" / "tiny" / "eval.json"
    assert EvalResult.from_dict(json.loads(stored.read_text(encoding="utf-8"))).ok > 0.9


def test_the_result_survives_json_and_prints_its_denominators(world: World):
    result = world.run(with_source_check=False)
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert EvalResult.from_dict(data) == result
    for shown in (str(result), result.to_markdown()):
        assert "FVE (raw variance, tiny-eval-v1+documents=60, n=120)" in shown
        for word in ("FVE (mean-norm)", "permuted", "floor", "ceiling", "120 ok", "captured share", "commit"):
            assert word in shown
    assert result.commit
    assert result.versions["torch"]
    assert result.seeds["protocol"] == 0
    assert result.wall_seconds > 0
    score = result.score()
    assert (score.value, score.n, score.protocol) == (result.fve.value, 120, result.protocol.name)
    assert result.score("mean_norm").value == result.real.fve_mean_norm.value
    with pytest.raises(InputError):
        EvalResult.from_dict({"format": 0})
    with pytest.raises(InputError):
        EvalResult.from_dict({**data, "surprise": 1})


def test_an_evaluation_is_deterministic(world: World):
    first, second = world.run(), world.run()
    ignored = ("wall_seconds",)
    assert {k: v for k, v in first.to_dict().items() if k not in ignored} == {
        k: v for k, v in second.to_dict().items() if k not in ignored
    }


def test_few_rows_are_not_measured(world: World):
    result = world.run(documents=20, facts=False)
    assert result.reference is None
    assert "not measured" in str(result.fve)
    assert result.real.cosine > 0.9


def test_a_corpus_goes_with_its_own_protocol(world: World, tmp_path: Path):
    with pytest.raises(InputError, match="its own documents"):
        run_protocol(world.nla, "tiny-eval-v1", corpus="x.txt")
    with pytest.raises(InputError, match="--corpus FILE"):
        run_protocol(world.nla, "nla-eval-v1")
    corpus = tmp_path / "held-out.jsonl"
    stories = [d.text for d in documents(400, 5, "eval") if d.kind == "story" and len(d.words) > 50]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in stories))
    result = run_protocol(world.nla, "nla-eval-v1", corpus=corpus, documents=21)
    assert (result.n, result.documents, result.facts, result.floor) == (105, 21, (), None)
    assert result.real.fve.dataset == "nla-eval-v1+documents=21 on held-out.jsonl"
    assert result.corpus == "held-out.jsonl"
    with pytest.raises(InputError, match=r"documents \(\d+ rows\) are missing"):
        run_protocol(world.nla, "nla-eval-v1", corpus=corpus, documents=1000)


def test_a_stored_reference_is_used_only_for_its_own_data_set(world: World, monkeypatch: pytest.MonkeyPatch):
    from nla_hub.geometry import Reference

    name = "tiny-eval-v1+documents=60"
    for dataset, used in ((name, 0.5), ("elsewhere", None)):
        stored = Reference(dataset, 10, 0.5, 0.6)
        monkeypatch.setattr(NLA, "reference", property(lambda self, stored=stored: stored))
        found = world.run(facts=False).reference.raw_variance
        assert (found == 0.5) is (used == 0.5)


# -- facts ---------------------------------------------------------------------------------------------------


def test_gold_labels_name_every_fact_and_permuted_ones_do_not(world: World):
    truth = world.run()
    assert {row.fact for row in truth.facts} == set(tiny_rows.facts_of_world())
    for row in truth.facts:
        if row.n >= 2:
            assert row.recall == row.precision_given == 1.0, row.fact
    assert all(row.n >= 10 for row in truth.facts)
    texts = [gold_label(r.document, r.char) for r in world.rows]
    world.say(texts[6:] + texts[:6])
    elsewhere = world.run()
    person = elsewhere.fact("person")
    assert person.recall < 0.5
    assert truth.figures()["recall.person"] == 1.0


def test_an_explanation_that_names_what_is_not_there_loses_precision(world: World):
    world.say([gold_label(r.document, r.char) + "; calls 3; total 7" for r in world.rows])
    result = world.run()
    assert result.fact("calls").named == result.n
    assert result.fact("calls").precision < 0.5
    assert result.fact("calls").precision_given == 1.0


def test_the_floor_label_tells_two_words_only(world: World):
    for row in world.rows[:200]:
        told = named_facts(floor_label(row.document, row.char))
        assert set(told) <= {"next_word", "last_word"}
        assert told.get("last_word") == row.facts["last_word"]
        assert len(floor_label(row.document, row.char).split()) <= 4


def test_evaluation_documents_are_not_among_those_of_training(world: World):
    result = world.run(facts=False)
    assert result.train_documents > 50
    assert result.shared_documents == 0


# -- the source itself ---------------------------------------------------------------------------------------


def test_memory_rows_lie_between_telling_and_asking(source: Path):
    bare = BareSource(source, LAYER)
    rows, found = memory_rows(bare, MEMORY_FACTS, split="eval", wanted=40, seed=0, limit=400)
    for fact, pairs in found.items():
        for index, value in pairs:
            row = rows[index]
            assert row.document.facts_at(row.char)[fact] == value
            assert any(s.start < row.char <= s.end and s.value == value for s in row.document.memory_spans(fact))


def test_a_random_source_holds_no_person(source: Path):
    rows = source_check(BareSource(source, LAYER), facts=("person", "mood"), wanted=200, train_wanted=400, limit=600)
    assert [row.fact for row in rows] == ["person", "mood"]
    assert all(row.n >= 200 and not row.held for row in rows)
    assert rows[0].accuracy < 0.5


def test_a_source_that_renders_otherwise_is_refused(tmp_path: Path):
    nla = NLA.from_pretrained(random_pair(tmp_path).root)
    with pytest.raises(InputError, match="does not render conversations as the tiny world does"):
        run_protocol(nla, "tiny-eval-v1")


# -- steering ------------------------------------------------------------------------------------------------


def test_prompts_end_where_the_answer_is_due():
    found = {}
    for document in documents(600, 0, "eval"):
        for fact in steering_module.STEERED_FACTS:
            at = cut(document, fact)
            if at is None:
                continue
            found[fact] = found.get(fact, 0) + 1
            assert document.text[at - 1] == ("/" if fact == "rhyme" else "?")
            value = document.facts_at(at)[fact]
            if fact != "rhyme":
                assert document.text[at:].split()[0].strip(".") == str(value)
    assert set(found) == set(steering_module.STEERED_FACTS)


def test_editing_replaces_whole_words_everywhere():
    assert edited("next mara; person mara; tamara", "mara", "otto") == "next otto; person otto; tamara"
    assert first_value("person", "the dog, otto and mara") == "otto"
    assert first_value("person", "nobody") is None


def test_the_table_counts_flips_of_cases_chosen_beforehand(world: World, monkeypatch: pytest.MonkeyPatch):
    """A planted source: it answers with the fact unless a hook steers it, and then with the edited one."""
    real_apply = steering_module.SteeringVector.apply
    steering: list[object] = []

    def watched(self, model, strength, **settings):
        context = real_apply(self, model, strength, **settings)

        class Watch:
            def __enter__(inner):
                steering.append((self, strength))
                return context.__enter__()

            def __exit__(inner, *error):
                steering.pop()
                return context.__exit__(*error)

        return Watch()

    monkeypatch.setattr(steering_module.SteeringVector, "apply", watched)
    by_ids = {}

    def answer(nla, prompts, new_tokens):
        texts = []
        for ids in prompts:
            case = by_ids.get(tuple(ids))
            tokenizer = nla.source.tokenizer
            text = tokenizer.decode(list(ids), skip_special_tokens=True)
            old = next(v for v in steering_module_values("person") if v in text.split() or f"{v}." in text.split())
            if steering and steering[-1][0].note not in ("random", "difference of means") and case is not None:
                old = case.new
            texts.append(f" {old}. the")
        return texts

    def steering_module_values(fact):
        from nla_hub.tiny.labels import FACTS

        return FACTS[fact]

    monkeypatch.setattr(steering_module, "continue_greedily", answer)
    cases, tried = find_cases(world.nla, "person", cases=6)
    assert len(cases) == 6 <= tried
    assert all(c.new != c.old == c.row.facts["person"] for c in cases)
    by_ids.update({tuple(c.ids): c for c in cases})
    table = steering_table(world.nla, facts=("person",), cases=6, strengths=(1.0, 2.0), probe_documents=40)
    assert table.best("person").rate == 1.0
    assert [r.flips for r in table.rows if r.vector != "nla"] == [0, 0, 0, 0]
    assert all(r.kept == 6 for r in table.rows if r.vector != "nla")
    assert all(r.cases == 6 and 0 <= r.low <= r.high <= 1 for r in table.rows)
    assert json.loads(json.dumps(table.to_dict()))["rows"][0]["fact"] == "person"
    assert "| person | 6 | nla |" in table.to_markdown()


def test_continuations_do_not_depend_on_the_batch(world: World):
    tokenizer = world.nla.source.tokenizer
    prompts = [
        tuple(tokenizer(t)["input_ids"]) for t in ("once mara had a drum.", "today otto came to the island. who?")
    ]
    together = steering_module.continue_greedily(world.nla, prompts, 6)
    assert together == [steering_module.continue_greedily(world.nla, [p], 6)[0] for p in prompts]


def test_unknown_facts_are_refused(world: World):
    with pytest.raises(InputError, match="shoe size"):
        steering_table(world.nla, facts=("shoe size",))


def test_encoded_rows_are_ordinary_tokens(world: World):
    tokenizer, limit = tiny_rows.source_tokenizer(world.nla)
    for row in world.rows[:100]:
        encoded: Encoded = tiny_rows.encode(tokenizer, row.document, limit)
        assert row.position >= 10
        assert not encoded.special[row.position]
        assert encoded.offsets[row.position][1] == row.char
        assert row.facts == tiny_rows.facts_at(row.document, row.char)


# -- the command line --------------------------------------------------------------------------------------------


@pytest.fixture
def command(world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs `nla-hub ...` on the planted pair; returns exit code, stdout and stderr."""
    app = typer.Typer(cls=RootGroup, callback=lambda: None)
    for module in (eval_command, steer_command):
        module.register(app)
    # Probes and means from few documents: what they find is tested elsewhere.
    monkeypatch.setattr("nla_hub.evaluation.run_protocol", partial(run_protocol, probe_documents=60))
    monkeypatch.setattr(NLA, "from_pretrained", classmethod(lambda cls, name, **settings: world.nla))

    def run(*arguments: str):
        with pytest.raises(SystemExit) as caught:
            app(list(arguments))
        captured = capsys.readouterr()
        return caught.value.code or 0, captured.out, captured.err

    return run


def test_eval_prints_one_json_object_and_gates_set_the_exit_code(command):
    arguments = ("eval", "tiny", "--documents", "60", "--no-facts", "--json")
    code, out, _ = command(*arguments, "--gate", "fve>=0.5", "--gate", "fve>permuted")
    assert code == 0
    assert EvalResult.from_dict(json.loads(out)).n == 120
    code, out, err = command(*arguments, "--sampled", "--gate", "fve_sampled>=0.5, ok_sampled>=1")
    assert code == 0
    assert EvalResult.from_dict(json.loads(out)).sampled.n == 120
    code, out, err = command(*arguments, "--gate", "fve_sampled>=0")
    assert (code, "fve_sampled was not measured" in err) == (3, True)
    code, out, err = command(*arguments, "--gate", "fve>=1.5")
    assert code == 3
    assert json.loads(out)["n"] == 120
    assert "fve>=1.5" in err


def test_eval_mistakes_cost_nothing(command):
    assert command("eval", "tiny", "--gate", "nonsense")[0] == 1
    assert "did you mean" in command("eval", "tiny", "--protocol", "tiny-eval-v2")[2]
    code, _, err = command("eval", "tiny", "--protocol", "nla-eval-v1")
    assert (code, "--corpus" in err) == (1, True)


def test_steer_prints_unsteered_and_steered_side_by_side(command, world: World):
    world.reconstructor.vectors |= {"person mara": torch.randn(D), "person otto": torch.randn(D)}
    arguments = ("steer", "--to", "person mara", "--minus", "person otto", "-s", "0,4", "once otto had a drum. who?")
    code, out, _ = command(*arguments, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [row["strength"] for row in rows] == [0.0, 0.0, 4.0]
    assert rows[0]["continuation"] == rows[1]["continuation"]
    code, out, _ = command(*arguments)
    assert "unsteered" in out


def test_steer_usage(command):
    assert command("steer", "a prompt")[0] == 2
    assert command("steer", "--table", "a prompt")[0] == 2
    assert command("steer", "--to", "x", "-s", "much", "a prompt")[0] == 2
    assert command("steer", "--to", "x", "-p", "here", "a prompt")[0] == 2
