"""Peak memory of random pairs of >= 500 MB against the estimate, each measured in a process of its own.

Prints the tables of docs/memory.md (Linux; some minutes, about 6 GB of disk):

    python tests/peaks.py
    python tests/peaks.py --loading

Peak is VmHWM minus the RSS after importing torch, transformers and nla_hub.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

HERE = Path(__file__).resolve()


@dataclass(frozen=True)
class Size:
    """A Llama of this shape; K is the pair's layer."""

    name: str
    d_model: int
    blocks: int
    layer: int
    mlp: int
    vocabulary: int = 32_000


SIZES = (
    Size("small", 1024, 7, 5, 2816),
    Size("medium", 1280, 9, 6, 3456),
    Size("large", 1536, 11, 7, 4096),
)
"""AVs of 590, 990 and 1,640 MB in float32; sources and ARs are smaller by an lm_head and the blocks above K."""


LOADED = replace(SIZES[1], vocabulary=16_000)
"""What loading is measured with: every part of it is >= 500 MB in float32."""

LOADS = (
    ("float32", "float32", "200MB"),
    ("float32", "float32", "5GB"),
    ("bfloat16", "float32", "200MB"),
    ("float32", "bfloat16", "200MB"),
)
"""dtype on disk, dtype in memory, largest shard."""


@dataclass(frozen=True)
class Work:
    """What a measured process does with a pair."""

    rows: int = 16
    max_new_tokens: int = 24
    words: int = 90
    temperature: float = 0.7


@dataclass(frozen=True)
class Measured:
    """One line of the table, in bytes."""

    size: str
    stored: str
    mode: str
    estimated: int
    peak: int

    @property
    def ratio(self) -> float:
        """Estimate over peak."""
        return self.estimated / self.peak


# -- a pair on disk ------------------------------------------------------------------------------------------


def build(root: Path, size: Size, *, dtype: str = "float32", lora: bool = False, shard: str = "200MB") -> Path:
    """Write `root`/source, /av and /ar: complete models, or LoRAs on the source."""
    import torch
    from torch import nn
    from transformers import LlamaConfig, LlamaForCausalLM

    from nla_hub.adapters import LLAMA
    from nla_hub.testing.random_models import random_tokenizer, sidecars

    kind = getattr(torch, dtype)
    tokenizer = random_tokenizer()

    def model(seed: int, blocks: int) -> Any:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.d_model,
            num_hidden_layers=blocks,
            num_attention_heads=size.d_model // 128,
            num_key_value_heads=size.d_model // 256,
            head_dim=128,
            intermediate_size=size.mlp,
            max_position_embeddings=1024,
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=1,
        )
        return LlamaForCausalLM(config).to(kind).eval()

    def save(place: Path, what: Any) -> None:
        what.save_pretrained(place, max_shard_size=shard)
        tokenizer.save_pretrained(place)

    av, ar = (
        s.with_(d_model=size.d_model, final_norm_stripped=True)
        for s in sidecars(tokenizer, "random/source", layer=size.layer)
    )
    save(root / "source", model(0, size.blocks))
    head = nn.Linear(size.d_model, size.d_model, bias=False)
    if lora:
        for place, blocks in ((root / "av", size.blocks), (root / "ar", size.layer + 1)):
            _write_lora(place, root / "source", size, blocks)
            tokenizer.save_pretrained(place)
    else:
        save(root / "av", model(1, size.blocks))
        trunk = model(2, size.layer + 1)
        LLAMA.drop_final_norm(trunk)
        del trunk.lm_head
        save(root / "ar", trunk)
    _write_tensors(root / "ar" / "value_head.safetensors", dict(head.state_dict()))
    av.write(root / "av")
    ar.write(root / "ar")
    return root


def _write_tensors(path: Path, tensors: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})


def _write_lora(place: Path, base: Path, size: Size, blocks: int, rank: int = 32) -> None:
    import torch

    torch.manual_seed(3)
    shapes = {
        "self_attn.q_proj": (size.d_model, size.d_model),
        "self_attn.v_proj": (size.d_model // 2, size.d_model),
        "mlp.up_proj": (size.mlp, size.d_model),
        "mlp.down_proj": (size.d_model, size.mlp),
    }
    tensors = {}
    for block in range(blocks):
        for module, (n_out, n_in) in shapes.items():
            name = f"base_model.model.model.layers.{block}.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, n_in) / n_in**0.5
            tensors[f"{name}.lora_B.weight"] = torch.randn(n_out, rank) * 0.01
    place.mkdir(parents=True)
    _write_tensors(place / "adapter_model.safetensors", tensors)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({module.rpartition(".")[2] for module in shapes}),
        "base_model_name_or_path": str(base),
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (place / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


# -- the estimate --------------------------------------------------------------------------------------------


def texts_of(work: Work) -> list[str]:
    """Texts of so many words each, all different: equal rows are computed once."""
    words = "the a cat dog sees walks red blue house river song night day old small quick".split()
    return [" ".join(Random(row).choices(words, k=work.words)) for row in range(work.rows)]


def estimated(root: Path, mode: str, work: Work, dtype: str = "float32") -> int:
    """What memory.py says from headers and configs."""
    import torch

    from nla_hub.adapters import adapter_for
    from nla_hub.memory import Workload, estimate, part_size
    from nla_hub.pretrained import load_config, load_tokenizer
    from nla_hub.prompts import ARPrompt, AVPrompt
    from nla_hub.sidecar import Sidecar
    from nla_hub.weights import WeightIndex, read_header

    def header(place: Path) -> dict[str, Any]:
        return {n: (t.shape, t.dtype) for n, t in WeightIndex.read(place).tensors.items()}

    def file(path: Path) -> dict[str, Any]:
        return {n: (t.shape, t.dtype) for n, t in read_header(path).items()}

    av, ar = Sidecar.read(root / "av"), Sidecar.read(root / "ar")
    lora = (root / "av" / "adapter_model.safetensors").exists()
    sizes = []
    for name in ("source", "av", "ar"):
        place = root / "source" if lora else root / name
        config = load_config(place)
        sizes.append(
            part_size(
                name,  # type: ignore[arg-type]
                header(place),
                config,
                adapter_for(config),
                dtype=getattr(torch, dtype),
                site=av.site,
                factors=file(root / name / "adapter_model.safetensors") if lora and name != "source" else None,
                head=file(root / "ar" / "value_head.safetensors") if name == "ar" else None,
            )
        )
    tokenizer = load_tokenizer(root / "source")
    prompt, question = ARPrompt.build(tokenizer, ar), AVPrompt.build(tokenizer, av)
    workload = Workload(
        batch_size=work.rows,
        prompt=len(question),
        shared=question.marker_position,
        max_new_tokens=work.max_new_tokens,
        text=max(len(tokenizer(text)["input_ids"]) for text in texts_of(work)),
        # What is scored here are the texts themselves, not the explanations.
        template=max(len(prompt.encode(text)) for text in texts_of(work)) - work.max_new_tokens,
        sampled=work.temperature > 0,
    )
    found = estimate(mode, sizes, workload)  # type: ignore[arg-type]
    assert found is not None
    return found.peak


# -- the measurement -----------------------------------------------------------------------------------------


def status(key: str) -> int:
    """VmHWM or VmRSS of this process in bytes, as Linux tells it."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def measure(root: Path, mode: str, work: Work, *, dtype: str = "auto", only_load: str | None = None) -> dict[str, int]:
    """Peak and RSS of a fresh process that uses a pair in one mode, or only loads one part of it ("pair": both halves)."""
    job = {"root": str(root), "mode": mode, "work": asdict(work), "dtype": dtype, "only_load": only_load}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(HERE), "--job", json.dumps(job)], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"{mode} of {root}:\n{done.stderr[-3000:]}")
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_job(job: dict[str, Any]) -> dict[str, int]:
    """What `measure` starts."""
    import torch
    import transformers.models.llama.modeling_llama as model_code  # transformers imports it when it is first asked for

    from nla_hub import NLA

    torch.set_num_threads(1)
    assert NLA and model_code
    root, work = Path(job["root"]), Work(**job["work"])
    begun = status("VmRSS")
    weights = _load(root, job) if job["only_load"] else _use(root, job["mode"], job["dtype"], work)
    return {"peak": status("VmHWM") - begun, "rss": status("VmRSS") - begun, "imports": begun, "weights": weights}


def _load(root: Path, job: dict[str, Any]) -> int:
    from nla_hub import NLA
    from nla_hub.checkpoints import load_ar
    from nla_hub.pretrained import LoadOptions, load_causal_lm, load_trunk
    from nla_hub.sidecar import Sidecar

    options, part = LoadOptions(dtype=job["dtype"]), job["only_load"]
    if part == "pair":
        nla = NLA.from_pretrained(root, dtype=job["dtype"])
        return _bytes(nla.av.engine.model) + _bytes(nla.ar.model)  # type: ignore[attr-defined]
    if part == "av":
        return _bytes(load_causal_lm(root / "av", options).model)
    if part == "source":
        return _bytes(load_trunk(root / "source", Sidecar.read(root / "av").site, options).model)
    loaded, head = load_ar(root / "ar", Sidecar.read(root / "ar"), options)
    return _bytes(loaded.model) + _bytes(head)


def _bytes(module: Any) -> int:
    return sum({p.data_ptr(): p.numel() * p.element_size() for p in module.parameters()}.values())


def _use(root: Path, mode: str, dtype: str, work: Work) -> int:
    from nla_hub import NLA

    nla = NLA.from_pretrained(root, dtype=dtype, memory=mode)  # type: ignore[arg-type]
    texts = texts_of(work)
    acts = nla.capture(texts, batch_size=work.rows)
    nla.verbalize(acts, max_new_tokens=work.max_new_tokens, temperature=work.temperature, batch_size=work.rows)
    nla.score(texts, acts, batch_size=work.rows)
    return 0


def table(sizes: tuple[Size, ...] = SIZES, work: Work | None = None) -> Iterator[Measured]:
    """Every size in three modes, complete models stored in float32 and bfloat16 and LoRAs; loaded in float32."""
    work = work or Work()
    for size in sizes:
        for dtype, lora, modes in (
            ("float32", False, ("resident", "staged")),
            ("bfloat16", False, ("resident", "staged")),
            ("float32", True, ("shared", "resident")),
        ):
            with tempfile.TemporaryDirectory() as place:
                root = build(Path(place) / "pair", size, dtype=dtype, lora=lora)
                for mode in modes:
                    peak = measure(root, mode, work)["peak"]
                    stored = f"{dtype}{', LoRA' if lora else ''}"
                    yield Measured(size.name, stored, mode, estimated(root, mode, work), peak)


def loading(root: Path, stored: str, loaded: str, shard: str) -> Iterator[tuple[str, int, int]]:
    """What is loaded, its bytes, and the peak of loading it."""
    pair = build(root / "pair", LOADED, dtype=stored, shard=shard)
    for what in ("pair", "av", "ar", "source") if loaded == "float32" else ("pair",):  # else below 500 MB
        found = measure(pair, "resident", Work(), dtype=loaded, only_load=what)
        yield what, found["weights"], found["peak"]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--size", choices=[size.name for size in SIZES], help="only this size")
    parser.add_argument("--loading", action="store_true", help="instead: the peaks of loading alone")
    arguments = parser.parse_args()
    if arguments.loading:
        print("| stored | largest shard | loaded in | part | weights, MB | peak / weights |\n|---|---|---|---|---|---|")
        for stored, loaded, shard in LOADS:
            with tempfile.TemporaryDirectory() as place:
                for what, weights, peak in loading(Path(place), stored, loaded, shard):
                    print(
                        f"| {stored} | {shard} | {loaded} | {what} | {weights / 1e6:.0f} | {peak / weights:.2f} |",
                        flush=True,
                    )
        return
    if arguments.job:
        print(json.dumps(run_job(json.loads(arguments.job))))
        return
    import torch
    import transformers

    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.platform()}")
    print("| size | stored as | mode | estimate, MB | peak, MB | estimate / peak |\n|---|---|---|---|---|---|")
    for row in table(tuple(s for s in SIZES if arguments.size in (None, s.name))):
        print(
            f"| {row.size} | {row.stored} | {row.mode} | {row.estimated / 1e6:.0f} | {row.peak / 1e6:.0f} | {row.ratio:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
