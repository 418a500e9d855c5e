"""What `nla-hub doctor` finds out about a pair: whether it is here, what it needs of memory, which mode it would run in.

Sizes come from headers: of the files that are here, or from the Hub before anything is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from nla_hub.errors import HubError, HubUnreachableError, NLAError
from nla_hub.units import size

if TYPE_CHECKING:
    from nla_hub.loading import Pair
    from nla_hub.memory import Estimate, Workload
    from nla_hub.pretrained import LoadOptions

State = Literal["ok", "missing", "too old", "too new", "broken", "too large", "note"]
CORE = "core"
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        part: "core", the name of an extra, "machine", "cache", "hub", "plug-in", "pair" or "memory".
        name: what was looked at.
        state: how it is; "note" judges nothing.
        found: a version, a size, a path; None where there is none.
        next_step: what to type, where something is to be done.
    """

    part: str
    name: str
    state: State
    found: str | None
    next_step: str | None = None

    @property
    def fatal(self) -> bool:
        """Whether nla-hub cannot do its main job because of this."""
        return self.part in (CORE, "pair") and self.state not in ("ok", "note")


def plugins() -> Iterator[Finding]:
    """The plug-ins of other distributions; a broken one costs only its own name."""
    from nla_hub import registry

    for plugin in registry.plugins():
        name = f"{plugin.group.rpartition('.')[2]}: {plugin.name}"
        origin = " ".join(filter(None, (plugin.distribution, plugin.version))) or None
        if plugin.state == "ok":
            yield Finding("plug-in", name, "ok", origin)
        else:
            step = f"update or uninstall {plugin.distribution or 'it'}; everything else works without it"
            yield Finding("plug-in", name, "broken", f"{origin or 'unknown'}: {plugin.cause}", step)


def pair(name: str, **parts: Any) -> Iterator[Finding]:
    """Whether a pair is here, and whether it loads. Of one on the Hub only the cache is looked at.

    `parts`: ar, base_model, subfolder, ar_subfolder, sidecar, as in `NLA.from_pretrained`.
    """
    from nla_hub.locate import resolve_pair

    named = {key: value for key, value in parts.items() if key != "sidecar"}
    refs = resolve_pair(name, **named)
    if any(ref is not None and ref.kind == "hub" for ref in (refs.av, refs.ar, refs.base)):
        yield from _in_cache(name, refs)
        return
    if any(finding.state == "too large" and finding.fatal for finding in memory(name, **parts)):
        yield Finding("pair", name, "note", "not loaded: it does not fit")
        return
    if _stands_on_the_hub(name, parts):
        yield Finding("pair", name, "note", "not loaded: its LoRAs lie on a base model that is on the Hub")
        return
    try:
        from nla_hub import NLA

        loaded = NLA.from_pretrained(name, **parts)
        where = loaded.av.sidecar.site  # under "staged" the halves are loaded when they are asked for
        loaded.ar  # noqa: B018
    except (NLAError, ImportError) as cause:
        step = cause.next_step if isinstance(cause, NLAError) else None
        yield Finding("pair", name, "broken", str(cause).splitlines()[0], step)
    else:
        yield Finding("pair", name, "ok", f"loads; reads {where}")


def _stands_on_the_hub(name: str, parts: Mapping[str, Any]) -> bool:
    """Whether loading a pair would fetch a base model for its LoRAs: nothing large is downloaded unasked."""
    try:
        opened = _opened(name, parts)
    except (NLAError, ImportError):  # loading says what is wrong
        return False
    loras = [half for half in (opened.av, opened.ar) if half is not None and half.place.form != "model"]
    return bool(loras) and opened.base is not None and opened.base.kind == "hub"


def _opened(name: str, parts: Mapping[str, Any], options: LoadOptions | None = None) -> Pair:
    """A pair opened without its weights."""
    from nla_hub.loading import open_pair
    from nla_hub.locate import resolve_pair
    from nla_hub.opening import read_contract

    told = dict(parts)
    sidecar = read_contract(told.pop("sidecar", None))
    return open_pair(resolve_pair(name, **told), sidecar=sidecar, load_options=options, weights=False)


def _in_cache(name: str, refs: Any) -> Iterator[Finding]:
    from nla_hub.hub import HubOptions

    for half, ref in {"AV": refs.av, "AR": refs.ar, "source": refs.base}.items():
        if ref is None or ref.kind != "hub":
            continue
        try:
            path = ref.fetch(HubOptions(local_files_only=True))
        except HubUnreachableError:
            yield Finding("pair", f"{name}: {half}", "note", f"{ref}: not downloaded yet")
        except NLAError as error:
            yield Finding("pair", f"{name}: {half}", "broken", error.what, error.next_step)
        else:
            yield Finding("pair", f"{name}: {half}", "ok", str(path))


AUTO = 'memory="auto"'


def memory(name: str, options: LoadOptions | None = None, **parts: Any) -> Iterator[Finding]:
    """Bytes of each part and of each mode against what is free here, and what `memory="auto"` takes.

    `parts`: see `pair`.
    """
    try:
        from nla_hub.memory import estimates
        from nla_hub.pretrained import LoadOptions
        from nla_hub.sizing import pair_sizes, workload_of
    except ImportError:  # torch or transformers is broken: reported elsewhere
        yield Finding("memory", name, "note", NOT_MEASURED)
        return
    options = options or LoadOptions()
    try:
        opened = _opened(name, parts, options)
        sizes = pair_sizes(opened, options)
    except HubUnreachableError as error:
        yield Finding(
            "memory",
            name,
            "note",
            f"{NOT_MEASURED}: its sizes are on the Hub, which cannot be reached, and the cache does not hold {error.where}",
            "run it again with a connection (and without HF_HUB_OFFLINE); weights are not downloaded for it",
        )
        return
    except HubError as error:
        yield Finding("memory", name, "note", f"{NOT_MEASURED}: {error.what}", error.next_step)
        return
    except NLAError as error:
        yield Finding("pair", name, "broken", str(error).splitlines()[0], error.next_step)
        return
    kind = str(options.torch_dtype()).removeprefix("torch.")
    for part in sizes:
        words = f"{size(part.stored)} on disk, {size(part.loaded)} loaded in {kind}"
        if part.own is not None:
            words += f" ({size(part.own)} of its own, laid over a base of {size(part.base or 0)})"
        yield Finding("memory", {"av": "AV", "ar": "AR"}.get(part.name, "source up to its layer"), "note", words)
    work = workload_of(opened)
    yield from _modes(name, opened, options, estimates(sizes, work, on_cpu=options.on_cpu()), work)


def _modes(
    name: str, opened: Pair, options: LoadOptions, found: Sequence[Estimate], work: Workload
) -> Iterator[Finding]:
    from nla_hub.hardware import free_memory
    from nla_hub.memory import MARGIN
    from nla_hub.sizing import device_of

    device = device_of(options)
    free = free_memory(device)
    room = None if free is None else MARGIN * free
    fits = {one.mode: room is None or one.peak <= room for one in found}
    for one in found:
        words = f"{size(one.peak)} at its peak ({size(one.weights)} of weights) on {device}"
        here = f"; {size(free)} are free" if free is not None else f"; {device} does not say what is free"
        yield Finding("memory", one.mode, "ok" if fits[one.mode] else "too large", words + here)
    yield Finding("memory", "reckoned with", "note", _words(work))
    if fits.get("resident"):
        yield Finding("memory", AUTO, "ok", "takes resident")
    elif fits.get("staged"):
        shared = 'memory="shared" fits too, and loads nothing twice' if fits.get("shared") else None
        yield Finding("memory", AUTO, "ok", "takes staged: one part at a time", shared)
    else:
        others = list(_ways_out(opened, options, room, work))
        step = "; or ".join(others) or "use a machine with more memory, or a smaller pair"
        yield Finding("pair", f"{name}: memory", "too large", "no mode fits here", step)


def _words(work: Workload) -> str:
    return (
        f"{work.batch_size} rows at once, a prompt of {work.prompt} tokens, explanations of {work.max_new_tokens}, "
        f"texts of {work.text}"
    )


def _ways_out(opened: Pair, options: LoadOptions, room: float | None, work: Workload) -> Iterator[str]:
    """What to type where nothing fits: only what was reckoned to fit."""
    from dataclasses import replace
    from importlib.util import find_spec

    from nla_hub.memory import estimate
    from nla_hub.sizing import pair_sizes

    assert room is not None

    def fits(how: LoadOptions, what: Workload, only: tuple[str, ...] = ("source", "av", "ar")) -> bool:
        sizes = [one for one in pair_sizes(opened, how) if one.name in only]
        found = estimate("staged", sizes, what, on_cpu=how.on_cpu())
        return found is not None and found.peak <= room

    if fits(options, replace(work, batch_size=1)):
        yield 'memory="staged" with batch_size=1'
    for bits in (8, 4):
        packed = replace(options, quantization_config={f"load_in_{bits}bit": True})
        if fits(packed, work):
            missing = "" if find_spec("bitsandbytes") else " (pip install 'nla-hub[quant]')"
            yield f'memory="staged", quantization_config=BitsAndBytesConfig(load_in_{bits}bit=True){missing}'
            break
    if fits(options, work, ("av",)):
        yield 'components=("av",): explanations of vectors that you bring, without scores'
