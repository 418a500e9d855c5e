"""In what form a pair is published: as it lies, its factors alone, merged, or packed in 8 or 4 bits.

Weights that are canonical already stay where they are. Whatever has to be written anew goes into a work directory, by the code
that converts any pair; a pair that was changed has no score until it is measured again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from nla_hub.convert import convert
from nla_hub.errors import PublishError
from nla_hub.hub import HubOptions
from nla_hub.loading import Pair, denies_head, open_pair
from nla_hub.locate import Ref, resolve_pair
from nla_hub.opening import Half
from nla_hub.publish.facts import Form, Quantised
from nla_hub.publish.release import LARGEST_FILE
from nla_hub.publish.staging.found import Found
from nla_hub.publish.staging.half_files import weight_files
from nla_hub.sidecar import Role
from nla_hub.weights import INDEX_NAME, WEIGHTS_NAME, WeightIndex, matches

ROLES: tuple[Role, Role] = ("av", "ar")


@dataclass(frozen=True)
class Prepared:
    """A pair as it is to be published.

    Attributes:
        pair: opened where its weights lie now.
        form, quantised: what they are.
        changed: whether other weights than the source's are published, so that the source's score says nothing about them.
        to_be_written: by role, weights that are not there yet: name -> estimated bytes.
        parity: figures by name that a packed pair was accepted on.
        values: by role, how many values were packed; {} where nothing is.
    """

    pair: Pair
    form: Form
    quantised: Quantised | None = None
    changed: bool = False
    to_be_written: Mapping[Role, Mapping[str, int]] = field(default_factory=dict)
    parity: Mapping[str, float] = field(default_factory=dict)
    values: Mapping[Role, int] = field(default_factory=dict)

    def half(self, role: Role) -> Half:
        """One of its halves."""
        half = self.pair.av if role == "av" else self.pair.ar
        assert half is not None
        return half


def opened(av: Path, ar: Path, base: Ref | None, options: HubOptions, *, weights: bool = False) -> Pair:
    """A pair whose contract is verified; its weights are not read."""
    refs = resolve_pair(av.absolute(), ar=ar.absolute())
    return open_pair(replace(refs, base=base or refs.base), hub_options=options, weights=weights)


def prepare(
    found: Found,
    form: Form | None,
    quantised: Quantised | None,
    *,
    base: Ref | None,
    options: HubOptions,
    work: Path | None,
) -> Prepared:
    """The weights of a pair in the form that is wanted.

    Args:
        form: None takes what lies there; a run that trained factors has them and the merged pair, and publishes the latter.
        base: the base model, where the caller or the place says it.
        work: an empty directory for what must be written; None writes nothing and estimates.

    Raises:
        PublishError: a form that cannot be made of what lies there.
        MissingExtraError: packing needs a package that is not installed.
        CheckpointError and its children, HubError and its children: the pair cannot be believed.
        GateFailedError: the packed pair no longer reads its own vectors.
    """
    av, ar = found.require_pair()
    if form == "lora" and found.factors:
        av, ar = found.factors["av"], found.factors["ar"]
    pair = opened(av, ar, base, options)
    stored = _stored_form(pair)
    wanted = form or ("full" if stored == "full" and not found.factors else stored if not found.factors else "merged")
    _require_possible(wanted, stored, quantised, found)
    done = Prepared(pair, wanted)
    if wanted == "lora":
        _require_alone(pair)
        return done
    if (wanted == "merged" and stored == "lora") or any(rewriting(h) for h in (pair.av, pair.ar) if h is not None):
        done = _rewritten(done, av, ar, base, options, work, changed=stored == "lora")
    if quantised is None:
        return done
    from nla_hub.publish.staging.packed import packed

    return packed(done, quantised, base=base, options=options, work=work)


def _stored_form(pair: Pair) -> Form:
    forms = {half.place.form for half in (pair.av, pair.ar) if half is not None}
    if forms == {"model"}:
        return "full"
    if "model" in forms:
        raise PublishError(
            "One half is a complete model, the other a LoRA.",
            where=pair.name,
            next_step="publish it merged: nla-hub convert SRC DST, then push DST",
        )
    return "lora"


def _require_possible(form: Form, stored: Form, quantised: Quantised | None, found: Found) -> None:
    if form == "lora" and stored != "lora":
        raise PublishError(
            "There are no factors here: these are complete weights.",
            where=found.path,
            next_step="leave --form out, or name the run that trained the factors",
        )
    if form == "lora" and quantised is not None:
        raise PublishError(
            "Factors are not packed.", next_step="--form merged with --quantize, or leave --quantize out"
        )
    if form == "full" and stored == "lora":
        raise PublishError("These are LoRA factors.", where=found.path, next_step="--form lora, or --form merged")
    if form == "merged" and stored == "full" and not found.factors:
        raise PublishError("There is nothing to merge: these are complete weights.", where=found.path)


def _require_alone(pair: Pair) -> None:
    """Raise a PublishError where factors act only together with others of their checkpoint."""
    for half in (pair.av, pair.ar):
        if half is not None and len(half.sidecar.adapter_stack or ()) > 1:
            raise PublishError(
                "These factors act on top of others.",
                where=half.files.directory,
                got=", ".join(half.sidecar.adapter_stack or ()),
                next_step="publish them merged: --form merged",
            )


def rewriting(half: Half) -> list[str]:
    """Why the files of a complete half cannot be published as they are; [] where they can."""
    if half.place.form != "model":
        return []
    directory, adapter = half.files.directory, half.adapter
    reasons = []
    if half.config.get_text_config() is not half.config:
        reasons.append("the text model stands in a multimodal wrapper")
    stored = WeightIndex.read(directory).tensors
    unused = [*adapter.ignored_weights]
    if half.role == "ar":
        unused += [*adapter.lm_head_weights, f"blocks>{adapter.blocks}>{half.sidecar.site.layer}"]
        unused += adapter.final_norm_weights if half.sidecar.final_norm_stripped is not False else ()
    elif denies_head(half, stored):
        reasons.append("the config denies the lm_head that is stored")
    if not_needed := [name for name in stored if matches(name, unused)]:
        reasons.append(f"{len(not_needed)} weights are not needed ({not_needed[0]})")
    large = [
        name for name in weight_files(directory, "model", half.role) if (directory / name).stat().st_size > LARGEST_FILE
    ]
    if large:
        reasons.append(f"{large[0]} is larger than {LARGEST_FILE // 10**9} GB")
    return reasons


def _rewritten(
    done: Prepared, av: Path, ar: Path, base: Ref | None, options: HubOptions, work: Path | None, *, changed: bool
) -> Prepared:
    """The pair with complete, canonical weights in the work directory (values kept, factors merged)."""
    if work is None:
        estimates = {role: {WEIGHTS_NAME: stored_bytes(done.half(role))} for role in ROLES}
        return replace(done, changed=changed, to_be_written=estimates)
    place = work / "complete"
    convert(opened(av, ar, base, options, weights=True), place)
    pair = opened(place / "av", place / "ar", base or done.pair.base, options)
    return replace(done, pair=pair, changed=changed)


def stored_bytes(half: Half) -> int:
    """Bytes of a half's weights as a complete model, as they lie here or on the Hub."""
    if half.under is None:
        names = weight_files(half.files.directory, "model", half.role)
        return sum((half.files.directory / name).stat().st_size for name in names if name != INDEX_NAME)
    checkpoint, folder = half.under.checkpoint, half.under.folder
    own = [n for n in checkpoint.files if n.rpartition("/")[0] == folder and n.endswith(".safetensors")]
    sizes = [checkpoint.sizes.get(n) or (checkpoint.fetch([]) / n).stat().st_size for n in own]
    if half.role == "av":
        return sum(sizes)
    return sum(sizes) * half.sidecar.site.n_blocks // int(half.config.get_text_config().num_hidden_layers)
