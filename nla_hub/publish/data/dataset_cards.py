"""Cards of published data sets: explanations of a job, activations, evaluation sets. Every figure is of the files beside it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nla_hub.evaluation.render import number
from nla_hub.explain.schema import COLUMNS, JOB, MANIFEST, PARTS, VECTORS
from nla_hub.geometry import FVE
from nla_hub.publish.card import dataset_card, size_category
from nla_hub.publish.card.scores import BASELINES
from nla_hub.publish.card.text import beginning, code, ending, inline, table
from nla_hub.publish.data.activations import ActivationFacts
from nla_hub.publish.data.evaluation_set import COLUMNS as EVALUATION_COLUMNS
from nla_hub.publish.data.explanations import SAMPLE_RANKS, JobFacts, Sample
from nla_hub.publish.facts import Licence
from nla_hub.publish.guards.scrub import mask

TAGS = ("nla", "interpretability")

SHARD = re.compile(r"(.+?)-\d+-of-\d+")
"""The name of one of several files that belong together; they are one configuration of the Hub's viewer."""

ACTIVATION_COLUMNS = {
    "activation_vector": "the vector as it left block K: float32 [d], not scaled",
    "activation_layer": "K, counted from 0",
    "doc_id": "the id of the document, or the sha256 of its text",
    "n_raw_tokens": "tokens that the model had read, this one included (position + 1)",
    "detokenized_text_truncated": "the text up to the token, where it may be published",
    "api_explanation": "what a labeler wrote about the text up to the token",
    "prompt": "the prompt of a training row, with <INJECT> where the vector goes",
    "response": "the answer of a training row",
}
"""Columns of activations with their meanings; the names are the reference implementation's."""

NOT_CERTIFIED = """\
An explanation says what a verbalizer wrote about a vector. A high cosine or FVE says that the vector can be made again from the
words, not that the words are true: they may name things that were never in the text. Do not take a single row for evidence."""

VECTORS_TELL = """\
The vectors are not anonymous: they hold what the model had read, and explanations of them can bring it back."""


def explanations_card(repo: str, tag: str, licence: Licence, facts: JobFacts) -> str:
    """The card of a job's explanations."""
    config = facts.config
    configs = [_config("explanations", [f"{PARTS}/*.parquet"], default=True)]
    if facts.width is not None:
        configs.append(_config("vectors", [f"{VECTORS}/*.parquet"]))
    source = _mapping(config.get("data")).get("repository")
    metadata = _metadata(repo, licence, facts.rows, (*TAGS, "explanations"), configs)
    metadata |= {"annotations_creators": ["machine-generated"]}
    metadata |= {"source_datasets": [source]} if isinstance(source, str) else {}
    body = [
        f"# {_title(repo)}",
        f"{facts.rows:,} rows from {facts.documents:,} documents: activations explained in words, each with a measured score, "
        "written by a natural language autoencoder (NLA): an activation verbalizer (AV) reads a vector of another model's "
        "residual stream and describes it, an activation reconstructor (AR) turns the words back into a vector.",
        NOT_CERTIFIED,
        "## Figures",
        _figures(facts),
        "## How it was made",
        table(("", ""), [(name, _safe(value)) for name, value in _provenance(config, facts.manifest)]),
        "## Files",
        table(("file", "what it is"), [(", ".join(map(code, names)), what) for names, what in _job_files(facts)]),
        "## Columns",
        table(("column", "meaning"), [(code(name), inline(meaning)) for name, meaning in COLUMNS.items()]),
        "A row without a usable explanation (`status` is not `ok`) counts with mse 2 and cosine 0. A row in error has no "
        "status.",
        "## Use",
        _use_explanations(repo, tag, facts),
        "## Samples",
        f"Of all explained rows, ordered by cosine, those at {_percent(SAMPLE_RANKS)} (0 % is the worst, 100 % the best); "
        "ties in the order of the rows.",
        _samples(facts.samples),
        "## Limits and licence",
        *([VECTORS_TELL] if facts.width is not None else []),
        _licence(licence, "explanations derive from the documents and from the models, whose terms apply besides"),
    ]
    return dataset_card(metadata, "\n\n".join(body) + "\n")


def activations_card(repo: str, tag: str, licence: Licence, facts: ActivationFacts) -> str:
    """The card of activations, or of an evaluation set."""
    groups: dict[str, list[str]] = {}
    for file in facts.files:
        stem = file.name.removesuffix(".parquet")
        together = SHARD.fullmatch(stem)
        groups.setdefault(together[1] if together else stem, []).append(file.name)
    kind, split = ("activations", "train") if facts.protocol is None else ("evaluation-set", "test")
    configs = [_config(name, files, split, default=not i) for i, (name, files) in enumerate(groups.items())]
    columns = dict.fromkeys(name for file in facts.files for name in file.columns)
    meanings = {**ACTIVATION_COLUMNS, **(EVALUATION_COLUMNS if facts.protocol is not None else {})}
    body = [
        f"# {_title(repo)}",
        _what(facts),
        "## Files",
        table(
            ("file", "rows", "columns"),
            [(code(file.name), f"{file.rows:,}", ", ".join(map(code, file.columns))) for file in facts.files],
        ),
        f"Beside each file lies its sidecar, `FILE.nla_meta.yaml`. All vectors: {facts.width} numbers, float32, as they left "
        f"block {facts.layer} (counted from 0) of {code(mask(facts.base_model))}.",
        "## Columns",
        table(
            ("column", "meaning"),
            [(code(name), inline(meanings.get(name, "as the author named it"))) for name in columns],
        ),
        "## Use",
        _use_activations(repo, tag, next(iter(groups)), split),
        "## Limits and licence",
        VECTORS_TELL,
        _licence(licence, "activations derive from the documents and from the model, whose terms apply besides"),
    ]
    metadata = _metadata(repo, licence, facts.rows, (*TAGS, kind), configs)
    return dataset_card(metadata, "\n\n".join(body) + "\n")


# -- metadata --------------------------------------------------------------------------------------------------


def _metadata(
    repo: str, licence: Licence, rows: int, tags: Sequence[str], configs: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    named = {"license_name": licence.name, "license_link": licence.link} if licence.id == "other" else {}
    return {
        "license": licence.id,
        **{key: value for key, value in named.items() if value is not None},
        "pretty_name": _title(repo),
        "tags": list(tags),
        "size_categories": [size_category(rows)],
        "configs": list(configs),
    }


def _config(name: str, paths: Sequence[str], split: str = "train", *, default: bool = False) -> dict[str, Any]:
    """A table of the Hub's viewer, and a configuration of `datasets.load_dataset`."""
    path: Any = paths[0] if len(paths) == 1 else list(paths)
    return {
        "config_name": name,
        **({"default": True} if default else {}),
        "data_files": [{"split": split, "path": path}],
    }


def _title(repo: str) -> str:
    return repo.partition("/")[2]


# -- explanations ----------------------------------------------------------------------------------------------


def _figures(facts: JobFacts) -> str:
    counts: list[tuple[str, ...]] = [
        (status, f"{count:,}", f"{count / facts.rows:.2%}") for status, count in sorted(facts.counts.items())
    ]
    explained = facts.rows - facts.counts.get("error", 0)
    lines = [table(("rows", "n", "share"), counts), ""]
    own = not _mapping(facts.config.get("reference"))
    lines += [f"- {_fve(fve, own=own)}" for fve in facts.fve]
    lines.append(f"- mean cosine: {number(facts.mean_cosine)}" + (f" (n={explained:,})" if explained else ""))
    return "\n".join(lines)


def _fve(fve: FVE, *, own: bool) -> str:
    """A score of these rows; unless their vectors are their `own` reference, only its denominator is the named data set's."""
    if fve.value is None:
        return str(fve)
    name = BASELINES[fve.baseline]
    denominator = f"their own {name} denominator" if own else f"the {name} denominator of {_safe(fve.dataset)}"
    return f"FVE of these {fve.n:,} rows against {denominator}: {number(fve.value)}"


def _provenance(config: Mapping[str, Any], manifest: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """What was asked for and with what, from job.yaml and manifest.json."""
    weights = _mapping(config.get("weights"))
    yield "pair", str(config.get("nla"))
    for role in ("av", "ar"):
        half = _mapping(weights.get(role))
        if half:
            commit = half.get("commit")
            known = f"commit {commit}" if commit else "no commit of the Hub"
            yield role.upper(), f"{known}; files {half.get('files')}, contract {half.get('contract')}"
    base, layer = config.get("base_model"), _mapping(config.get("site")).get("layer")
    yield "base model", f"{base or 'not known'}, output of block {layer} (counted from 0)"
    data = _mapping(config.get("data"))
    files = data.get("files")
    listed = ", ".join(sorted(files)[:5]) + (", ..." if len(files) > 5 else "") if isinstance(files, Mapping) else files
    named = [data.get("repository") and f"{data['repository']}@{data.get('commit')}", listed and f"files: {listed}"]
    yield "documents", "; ".join(str(part) for part in named if part) or "not known"
    yield "positions", str(config.get("positions"))
    drawn = "greedy" if not config.get("temperature") else f"temperature {config['temperature']}"
    n, most, seed = config.get("n"), config.get("max_new_tokens"), config.get("seed")
    yield "sampling", f"{drawn}, {n} a vector, at most {most} tokens, seed {seed}"
    yield (
        "engine",
        f"{config.get('engine')}, blocks of {config.get('block')} rows, batch size {manifest.get('batch_size')}",
    )
    reference = _mapping(config.get("reference"))
    if reference:
        yield (
            "FVE denominators",
            (
                f"{reference.get('dataset')}, n={reference.get('n')}: raw variance "
                f"{number(reference.get('raw_variance'), 4)}, mean-norm {number(reference.get('mean_norm'), 4)}"
            ),
        )
    yield "versions", ", ".join(f"{name} {version}" for name, version in _mapping(manifest.get("software")).items())


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _job_files(facts: JobFacts) -> list[tuple[tuple[str, ...], str]]:
    found: list[tuple[tuple[str, ...], str]] = [
        ((f"{PARTS}/*.parquet",), f"the rows in order, in {facts.blocks:,} files"),
        ((JOB, MANIFEST), "what was asked for; counts, scores and versions"),
    ]
    if facts.width is not None:
        what = f"`row` and `activation_vector`: float32 [{facts.width}], as captured, of each row that has one"
        found.append(((f"{VECTORS}/*.parquet",), what))
    return found


def _use_explanations(repo: str, tag: str, facts: JobFacts) -> str:
    joined = (
        f'vectors = pandas.read_parquet("hf://datasets/{repo}@{tag}/{VECTORS}")\n'
        'rows = rows.merge(vectors, on="row", how="left")\n'
        if facts.width is not None
        else ""
    )
    return f"""\
```python
import pandas

rows = pandas.read_parquet("hf://datasets/{repo}@{tag}/{PARTS}")
{joined}```

```python
from datasets import load_dataset

rows = load_dataset("{repo}", "explanations", split="train", revision="{tag}")
```

As a job of `nla-hub`, with its figures, or as one page with search, worst and best rows:

```python
from pathlib import Path

from huggingface_hub import snapshot_download
from nla_hub.explain import JobResult

job = JobResult.open(Path(snapshot_download("{repo}", repo_type="dataset", revision="{tag}")))
print(job.manifest["counts"], job.manifest["fve"][0])
```

```bash
hf download {repo} --repo-type dataset --revision {tag} --local-dir ./{_title(repo)}
nla-hub report ./{_title(repo)}
```"""


def _samples(samples: Sequence[Sample]) -> str:
    if not samples:
        return "No row was explained."
    rows: list[tuple[str, ...]] = []
    for sample in samples:
        row = sample.row
        text = row["text"] if row["text"] is not None else f"({row['status']}) {row['raw']}"
        rows.append(
            (
                _percent([sample.rank]),
                str(row["row"]),
                _safe(ending(row["context"])) if row["context"] else "(a bare vector)",
                _safe(beginning(text)),
                number(row["cosine"]),
                inline(", ".join(row["flags"] or ())) or "-",
            )
        )
    return table(("place", "row", "text up to the token", "explanation", "cosine", "flags"), rows)


def _safe(text: str) -> str:
    """A text of somebody else in a cell: without what no card may show, and without any meaning to Markdown."""
    return inline(mask(text))


def _percent(ranks: Iterable[float]) -> str:
    return ", ".join(f"{rank:.0%}".replace("%", " %") for rank in ranks)


# -- activations -----------------------------------------------------------------------------------------------


def _what(facts: ActivationFacts) -> str:
    if facts.protocol is None:
        return (
            f"{facts.rows:,} activations of a language model's residual stream: what a natural language autoencoder (NLA) is "
            "trained on and explains."
        )
    protocol = facts.protocol
    own = protocol.get("documents", 0) * protocol.get("positions", 0)
    further = facts.rows - own
    return (
        f"The rows on which `{protocol.get('name')}` measures a natural language autoencoder (NLA): {own:,} activations of "
        f"{protocol.get('documents'):,} documents, {protocol.get('positions')} a document, position >= "
        f"{protocol.get('min_position')}, special tokens excluded, seed {protocol.get('seed')}"
        + (f"; and {further:,} further rows for facts that few of these have (`own` is false)" if further else "")
        + ".\n\nScores that model cards of NLAs name with this data set were measured on it: an FVE is comparable with "
        "another one of the same rows only. Nothing may be trained on these documents."
    )


def _use_activations(repo: str, tag: str, config: str, split: str) -> str:
    return f"""\
Explain them, with a pair that reads this layer of this model:

```bash
nla-hub explain --data hf://datasets/{repo}@{tag} --nla OWNER/PAIR -o OUT
```

```python
from datasets import load_dataset

rows = load_dataset("{repo}", "{config}", split="{split}", revision="{tag}").with_format("numpy")
```"""


def _licence(licence: Licence, besides: str) -> str:
    named = f"[{licence.name or licence.id}]({licence.link})" if licence.link else (licence.name or licence.id)
    notice = f" {licence.notice}." if licence.notice else ""
    return f"Licence, as its author names it: {named}; {besides}.{notice}"
