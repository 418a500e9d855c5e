"""The layouts of NLA checkpoints in the wild, built small, each with what its halves must compute.

Every row of docs/layouts.md is one of these (`python tests/wild.py > docs/layouts.md`). What a half must compute comes from
the modules it was written from (peft's own layers for LoRAs), never from nla_hub.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MARKER, LAYER, D = "㊥", 2, 64
AV_TEMPLATE = "What stands in <v>{injection_char}</v>?"
AR_TEMPLATE = "Words: {explanation}\nVector:"
TEXTS = ("the cat sees a house", "a song", "who walks in the night and then of the river, the old dog")


@dataclass(frozen=True)
class Built:
    """A checkpoint on disk.

    Attributes:
        name: what to pass to `NLA.from_pretrained`, with `options`.
        logits: next-token logits of the AV under `vectors()`, [7, vocabulary]; None where there is no AV.
        vectors: what the AR makes of TEXTS, [3, 64]; None where there is no AR.
    """

    name: Path
    options: dict[str, Any] = field(default_factory=dict)
    logits: Tensor | None = None
    vectors: Tensor | None = None


@dataclass(frozen=True)
class Layout:
    """One row of the table.

    Attributes:
        key: short name. files: what lies where. writer: who writes it.
        build: writes one under a directory.
        needs: what the user has to say besides the name.
        refused: words of the refusal, where it must not load.
    """

    key: str
    files: str
    writer: str
    build: Callable[[World, Path], Built]
    needs: str = ""
    refused: str = ""


def vectors() -> Tensor:
    """Seven raw vectors of very different norms."""
    rows = torch.randn(7, D, generator=torch.Generator().manual_seed(5))
    return rows * torch.logspace(-2, 5, 7)[:, None]


class World:
    """A base model and a tokenizer, and the halves that the layouts are made of."""

    def __init__(self) -> None:
        from nla_hub.testing import random_model, random_tokenizer

        self.tokenizer = random_tokenizer()
        self.vocabulary = len(self.tokenizer)
        self.base = random_model("llama", self.vocabulary, seed=10)
        self.full_av = random_model("llama", self.vocabulary, seed=11)
        self.full_ar = random_model("llama", self.vocabulary, seed=12)
        torch.manual_seed(13)
        self.head = nn.Linear(D, D, bias=True)
        ids = self.tokenizer(AV_TEMPLATE.format(injection_char=MARKER), add_special_tokens=False)["input_ids"]
        at = ids.index(self.tokenizer(MARKER, add_special_tokens=False)["input_ids"][0])
        self.marker = ids[at - 1 : at + 2]
        self.suffix = self.tokenizer("x\nVector:", add_special_tokens=False)["input_ids"][-2:]

    # -- sidecars --------------------------------------------------------------------------------------------

    def tokens(self) -> dict[str, Any]:
        left, marker, right = self.marker
        return {
            "injection_char": MARKER,
            "injection_token_id": marker,
            "injection_left_neighbor_id": left,
            "injection_right_neighbor_id": right,
            "critic_suffix_ids": self.suffix,
        }

    def model_sidecar(self, role: str, **changes: Any) -> dict[str, Any]:
        """As the released pairs have it."""
        return {
            "kind": "nla_model",
            "schema_version": 2,
            "role": role,
            "base_checkpoint": "owner/base",
            "d_model": D,
            "extraction_layer_index": LAYER,
            "extraction": {"injection_scale": 8.0 if role in ("av", "actor") else None, "mse_scale": 8.0},
            "tokens": self.tokens(),
            "prompt_templates": {"av": AV_TEMPLATE, "ar": AR_TEMPLATE},
            **changes,
        }

    def dataset_sidecar(self, **changes: Any) -> dict[str, Any]:
        """A copied data set's sidecar, as EasyNLA leaves it beside its LoRAs: no role, no scales, no kind of injection."""
        return {
            "kind": "nla_dataset",
            "schema_version": 1,
            "dataset_id": "fixture",
            "stage": "rl",
            "row_count": 7,
            "extraction": {"base_model": "owner/base", "d_model": D, "layer_index": LAYER, "norm": "none"},
            "tokens": self.tokens(),
            "prompt_templates": {"actor": AV_TEMPLATE, "critic": AR_TEMPLATE},
            "parent_datasets": [],
            **changes,
        }

    # -- what must come out ----------------------------------------------------------------------------------

    def av_logits(self, model: Any, *, kind: str = "overwrite", scale: float | None = 8.0) -> Tensor:
        """Next-token logits of a causal LM whose marker got `vectors()`."""
        text = f"<bos><|user|>\n{AV_TEMPLATE.format(injection_char=MARKER)}<|end|>\n<|assistant|>\n"
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        at = ids.index(self.marker[1])
        rows = vectors()
        unit = rows.double() / rows.double().norm(dim=-1, keepdim=True)
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        with torch.no_grad():
            embeds = inner.get_input_embeddings()(torch.tensor(ids).expand(len(rows), -1)).clone()
            if kind == "overwrite":
                embeds[:, at] = rows if scale is None else (unit * scale).float()
                return model(inputs_embeds=embeds, use_cache=False).logits[:, -1]

            def add(_module: Any, _args: Any, output: Any) -> Any:
                hidden = (output[0] if isinstance(output, tuple) else output).clone()
                here = hidden[:, at].double()
                hidden[:, at] = (here + here.norm(dim=-1, keepdim=True) * unit).float()
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            handle = inner.model.layers[1].register_forward_hook(add)
            logits = model(inputs_embeds=embeds, use_cache=False).logits[:, -1]
            handle.remove()
        return logits

    def ar_vectors(
        self, model: Any, *, bias: bool = False, normalized: bool = False, behind_norm: bool = False
    ) -> Tensor:
        """What the head makes of the residual stream behind block K of a complete causal LM (four blocks, K = 2)."""
        found = []
        for text in TEXTS:
            ids = self.tokenizer(AR_TEMPLATE.replace("{explanation}", text))["input_ids"]
            with torch.no_grad():
                out = model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False)
                h = out.hidden_states[LAYER + 1][0, -1]
                if behind_norm:
                    h = (model.get_base_model() if hasattr(model, "get_base_model") else model).model.norm(h)
                h = h * (8.0 / h.norm()) if normalized else h
                found.append(h @ self.head.weight.T + (self.head.bias if bias else 0))
        return torch.stack(found)

    # -- parts on disk ---------------------------------------------------------------------------------------

    def write_base(self, directory: Path) -> None:
        self.base.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)

    def write_av(self, directory: Path, sidecar: dict[str, Any] | None) -> None:
        self.full_av.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
        write_sidecar(directory, sidecar)

    def ar_state(self) -> dict[str, Tensor]:
        """Weights of an AR by their names in a causal LM: no norm, no lm_head, blocks up to K."""
        state = self.full_ar.state_dict()
        above = tuple(f"model.layers.{i}." for i in range(LAYER + 1, 8))
        return {
            name: value.contiguous()
            for name, value in state.items()
            if not name.startswith(above) and name not in ("lm_head.weight", "model.norm.weight")
        }

    def write_ar(self, directory: Path, sidecar: dict[str, Any] | None, *, bias: bool = False, **extra: Tensor) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        config = copy.deepcopy(self.full_ar.config)
        config.num_hidden_layers = LAYER + 1
        config.save_pretrained(directory)
        save_file({**self.ar_state(), **extra}, directory / "model.safetensors", metadata={"format": "pt"})
        self.write_head(directory, bias=bias)
        self.tokenizer.save_pretrained(directory)
        write_sidecar(directory, sidecar)

    def write_head(self, directory: Path, *, bias: bool = False) -> None:
        head = {"weight": self.head.weight.detach().clone()}
        if bias:
            head["bias"] = self.head.bias.detach().clone()
        save_file(head, directory / "value_head.safetensors")

    def lora(self, seed: int, *, base: Any = None, rslora: bool = True, near: Any = None, **settings: Any) -> Any:
        """A peft model with a random LoRA on (a copy of) the base; `near` is one that this one continues."""
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        config = LoraConfig(
            **{"r": 4, "lora_alpha": 6, "use_rslora": rslora, "init_lora_weights": False, "lora_dropout": 0.0}
            | {"target_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"], "task_type": "CAUSAL_LM"}
            | settings
        )
        model = get_peft_model(copy.deepcopy(self.base if base is None else base), config).eval()
        if near is not None:
            state = {n: p for n, p in near.named_parameters() if "lora_" in n}
            with torch.no_grad():
                for name, value in model.named_parameters():
                    if "lora_" in name:
                        value.copy_(state[name] + 0.1 * state[name].std() * torch.randn_like(value))
        return model

    def write_ar_lora(
        self, directory: Path, model: Any, *, meta: bool = True, norm_stripped: bool | None = True
    ) -> None:
        """EasyNLA's form: factors of a trunk inside a `backbone`, the head in the same file, no adapter_config.json."""
        directory.mkdir(parents=True, exist_ok=True)
        above = tuple(f"layers.{i}." for i in range(LAYER + 1, 8))
        state = {
            "backbone." + name.removeprefix("base_model.model."): value.detach().clone()
            for name, value in model.named_parameters()
            if "lora_" in name and not any(part in name for part in above)
        }
        state["value_head.weight"] = self.head.weight.detach().clone()
        save_file(state, directory / "ar_lora_value_head.safetensors")
        if meta:
            said = {"ar_num_layers": LAYER + 1, "lora_r": 4, "lora_alpha": 6, "quant": "none", "target_modules": []}
            if norm_stripped is not None:
                said["final_norm_stripped"] = norm_stripped
            (directory / "ar_meta.json").write_text(json.dumps(said), encoding="utf-8")


def write_sidecar(directory: Path, sidecar: dict[str, Any] | None) -> None:
    if sidecar is not None:
        directory.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(sidecar, sort_keys=False, allow_unicode=True)
        (directory / "nla_meta.yaml").write_text(text, encoding="utf-8")


# -- complete models -----------------------------------------------------------------------------------------


def two_directories(world: World, root: Path) -> Built:
    world.write_av(root / "x-av", world.model_sidecar("av"))
    world.write_ar(root / "x-ar", world.model_sidecar("ar"))
    return Built(root / "x-av", {}, world.av_logits(world.full_av), world.ar_vectors(world.full_ar))


def one_directory(world: World, root: Path) -> Built:
    world.write_av(root / "av", world.model_sidecar("actor", prompt_templates={"actor": AV_TEMPLATE}))
    world.write_ar(root / "ar", world.model_sidecar("critic", prompt_templates={"critic": AR_TEMPLATE}))
    return Built(root, {}, world.av_logits(world.full_av), world.ar_vectors(world.full_ar))


def sharded(world: World, root: Path) -> Built:
    built = one_directory(world, root)
    for half in ("av", "ar"):
        shard(root / half / "model.safetensors")
    return built


def dummy_head(world: World, root: Path) -> Built:
    """The released Llama AR: a [d, d] lm_head and a norm of ones in a shard of their own."""
    built = one_directory(world, root)
    index = shard(root / "ar" / "model.safetensors")
    extra = {"lm_head.weight": torch.full((D, D), 7.0), "model.norm.weight": torch.ones(D)}
    save_file(extra, root / "ar" / "model-megatron-compat.safetensors", metadata={"format": "pt"})
    said = json.loads(index.read_text(encoding="utf-8"))
    said["weight_map"] |= dict.fromkeys(extra, "model-megatron-compat.safetensors")
    index.write_text(json.dumps(said), encoding="utf-8")
    return built


def shard(path: Path) -> Path:
    """Split one file of weights in two, with an index."""
    state = load_file(path)
    names = sorted(state)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{i:05d}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, path.with_name(file), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    path.unlink()
    index = path.with_name("model.safetensors.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    return index


def head_with_bias(world: World, root: Path) -> Built:
    world.write_ar(root, world.model_sidecar("ar"), bias=True)
    return Built(root, {"components": ("ar",)}, None, world.ar_vectors(world.full_ar, bias=True))


def normalized_head(world: World, root: Path) -> Built:
    world.write_ar(root, world.model_sidecar("ar", head_input="normalized"), bias=True)
    return Built(root, {"components": ("ar",)}, None, world.ar_vectors(world.full_ar, bias=True, normalized=True))


def kept_norm(world: World, root: Path) -> Built:
    norm = {"model.norm.weight": torch.linspace(0.5, 2.0, D)}
    world.write_ar(root, world.model_sidecar("ar", final_norm_stripped=False), **norm)
    model = copy.deepcopy(world.full_ar)
    model.model.norm.weight.data.copy_(norm["model.norm.weight"])
    return Built(root, {"components": ("ar",)}, None, world.ar_vectors(model, behind_norm=True))


def raw_injection(world: World, root: Path) -> Built:
    world.write_av(root, world.model_sidecar("av", extraction={"injection_scale": None}))
    return Built(root, {"components": ("av",)}, world.av_logits(world.full_av, scale=None), None)


def added(world: World, root: Path) -> Built:
    sidecar = world.model_sidecar("av", injection={"kind": "add"}, extraction={"mse_scale": "sqrt_d_model"})
    world.write_av(root, sidecar)
    return Built(root, {"components": ("av",)}, world.av_logits(world.full_av, kind="add"), None)


def run_folders(world: World, root: Path) -> Built:
    """`iter_0000200/{av,ar}`: complete halves of several steps in one checkpoint."""
    for step in ("iter_0000100", "iter_0000200"):
        world.write_av(root / step / "av", world.model_sidecar("av"))
        world.write_ar(root / step / "ar", world.model_sidecar("ar"))
    for path in (root / "iter_0000100").glob("*/model.safetensors"):
        save_file({name: value + 1 for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
    return Built(root, {"subfolder": "iter_0000200"}, world.av_logits(world.full_av), world.ar_vectors(world.full_ar))


def no_sidecar(world: World, root: Path) -> Built:
    world.write_av(root / "av", None)
    world.write_ar(root / "ar", None)
    told = {
        "extraction_layer_index": LAYER,
        "tokens": {"injection_char": MARKER},
        "prompt_templates": {"av": AV_TEMPLATE, "ar": AR_TEMPLATE},
        "extraction": {"injection_scale": 8.0},
    }
    return Built(root, {"sidecar": told}, world.av_logits(world.full_av), world.ar_vectors(world.full_ar))


# -- LoRAs ---------------------------------------------------------------------------------------------------


def peft_pair(world: World, root: Path) -> Built:
    """An AV and an AR in PEFT's form, the AR with a separate value head; the base beside them."""
    world.write_base(root / "source")
    av, ar = world.lora(20, rslora=False), world.lora(21)
    av.save_pretrained(root / "av")
    write_sidecar(root / "av", world.model_sidecar("av"))
    ar.save_pretrained(root / "ar")
    blocks_up_to_site(root / "ar" / "adapter_model.safetensors")
    world.write_head(root / "ar")
    write_sidecar(root / "ar", world.model_sidecar("ar", final_norm_stripped=True))
    return Built(root, {}, world.av_logits(av), world.ar_vectors(ar))


def blocks_up_to_site(path: Path) -> None:
    """Drop the factors of blocks that an AR does not have."""
    above = tuple(f"layers.{i}." for i in range(LAYER + 1, 8))
    state = {n: v for n, v in load_file(path).items() if not any(part in n for part in above)}
    save_file(state, path, metadata={"format": "pt"})


def easynla_sft(world: World, root: Path) -> Built:
    world.write_base(root / "base")
    av, ar = world.lora(22), world.lora(23)
    av.save_pretrained(root / "x_av" / "iter_0001000")
    world.tokenizer.save_pretrained(root / "x_av" / "iter_0001000")
    world.write_ar_lora(root / "x_ar" / "iter_0001000", ar)
    world.tokenizer.save_pretrained(root / "x_ar" / "iter_0001000")
    for half in ("x_av", "x_ar"):
        write_sidecar(root / half / "iter_0001000", world.dataset_sidecar())
    return Built(
        root / "x_av" / "iter_0001000",
        {
            "ar": root / "x_ar" / "iter_0001000",
            "base_model": root / "base",
            "sidecar": {"injection": {"kind": "add"}},
        },
        world.av_logits(av, kind="add"),
        world.ar_vectors(ar, normalized=True),
    )


def easynla_rl(world: World, root: Path) -> Built:
    """`iter_000400/` with its critic inside; the frozen copy of the policy in `reference/` is no half."""
    world.write_base(root / "base")
    av, ar = world.lora(24), world.lora(25)
    av.save_pretrained(root / "run" / "iter_000400")
    world.lora(26).save_pretrained(root / "run" / "iter_000400" / "reference")
    world.write_ar_lora(root / "run" / "iter_000400" / "critic", ar)
    write_sidecar(root / "run", world.dataset_sidecar(injection={"kind": "add"}))
    return Built(
        root / "run",
        {"base_model": root / "base"},
        world.av_logits(av, kind="add"),
        world.ar_vectors(ar, normalized=True),
    )


def critic_latest(world: World, root: Path) -> Built:
    """`iter_000400/` beside `critic_latest/`, a complete AR that still has the `ar_meta.json` of its LoRA."""
    world.write_base(root / "base")
    av = world.lora(27)
    av.save_pretrained(root / "run" / "iter_000400")
    world.write_ar(root / "run" / "critic_latest", None)
    (root / "run" / "critic_latest" / "ar_meta.json").write_text(
        json.dumps({"ar_num_layers": LAYER + 1, "lora_r": 4, "lora_alpha": 6, "final_norm_stripped": True}),
        encoding="utf-8",
    )
    write_sidecar(root / "run", world.dataset_sidecar(injection={"kind": "add"}))
    return Built(
        root / "run",
        {"base_model": root / "base"},
        world.av_logits(av, kind="add"),
        world.ar_vectors(world.full_ar),
    )


def stages(world: World, root: Path) -> Built:
    """An RL LoRA that was begun anew on top of the supervised one: both act."""
    from peft import PeftModel

    world.write_base(root / "base")
    sft = world.lora(28)
    sft.save_pretrained(root / "x" / "av_sft_lora")
    world.lora(29).save_pretrained(root / "x" / "av_rl_lora_step400")
    world.write_ar(root / "x" / "rl_critic_step400", None)
    other = copy.deepcopy(world)
    other.full_ar.model.layers[0].mlp.up_proj.weight.data.add_(1)
    other.write_ar(root / "x" / "ar_sft_critic", None)
    write_sidecar(root / "x", world.dataset_sidecar(injection={"kind": "add"}))
    both = PeftModel.from_pretrained(copy.deepcopy(world.base), root / "x" / "av_sft_lora", adapter_name="sft")
    both.load_adapter(root / "x" / "av_rl_lora_step400", adapter_name="rl")
    both.base_model.set_adapter(["sft", "rl"])
    return Built(
        root / "x",
        {"base_model": root / "base", "subfolder": "av_rl_lora_step400"},
        world.av_logits(both.eval(), kind="add"),
        world.ar_vectors(world.full_ar),
    )


def continued(world: World, root: Path) -> Built:
    """An RL LoRA that continues the supervised one, and so stands in its place."""
    world.write_base(root / "base")
    sft = world.lora(30)
    rl = world.lora(31, near=sft)
    sft.save_pretrained(root / "x" / "av_sft_lora")
    rl.save_pretrained(root / "x" / "av_rl_lora")
    ar_sft = world.lora(32)
    ar = world.lora(33, near=ar_sft)
    world.write_ar_lora(root / "x" / "ar_sft_critic", ar_sft)
    world.write_ar_lora(root / "x" / "rl_critic", ar, meta=False)
    write_sidecar(root / "x", world.dataset_sidecar(injection={"kind": "add"}))
    told = {"ar_meta": {"ar_num_layers": LAYER + 1, "lora_alpha": 6, "final_norm_stripped": True}}
    return Built(
        root / "x",
        {"base_model": root / "base", "subfolder": "av_rl_lora", "sidecar": told},
        world.av_logits(rl, kind="add"),
        world.ar_vectors(ar, normalized=True),
    )


def own_base(world: World, root: Path) -> Built:
    """An RL LoRA on a merged AV that lies in the same checkpoint; its config names something else."""
    world.full_av.save_pretrained(root / "av_base")
    world.tokenizer.save_pretrained(root / "av_base")
    av = world.lora(34, base=world.full_av)
    av.save_pretrained(root / "av_rl_adapters" / "iter_000100")
    world.write_ar(root / "ar_reconstructor", None)
    write_sidecar(root, world.dataset_sidecar(injection={"kind": "add"}))
    return Built(
        root,
        {
            "subfolder": "av_rl_adapters/iter_000100",
            "sidecar": {"adapter_stack": ["av_base", "av_rl_adapters/iter_000100"]},
        },
        world.av_logits(av, kind="add"),
        world.ar_vectors(world.full_ar),
    )


def wrapper_base(world: World, root: Path) -> Built:
    """A LoRA whose base is a multimodal wrapper: only its text stack is loaded, the vision tower is left over."""
    from transformers import Gemma3ForCausalLM

    from nla_hub.testing import random_gemma3_wrapper

    wrapper = random_gemma3_wrapper(world.vocabulary, seed=3)
    text = Gemma3ForCausalLM(wrapper.config.text_config).eval()
    text.model.load_state_dict(wrapper.model.language_model.state_dict())
    text.tie_weights()
    wrapper.save_pretrained(root / "source")
    world.tokenizer.save_pretrained(root / "source")
    av = world.lora(37, base=text)
    av.save_pretrained(root / "av")
    write_sidecar(root / "av", world.model_sidecar("av", injection={"kind": "add"}))
    return Built(root, {"components": ("av",)}, world.av_logits(av, kind="add"), None)


# -- what must not load --------------------------------------------------------------------------------------


def whitened(world: World, root: Path) -> Built:
    extraction = {"d_model": D, "layer_index": LAYER, "norm": "whitened_zca_v1", "injection_scale": 8.0}
    world.write_av(root, world.model_sidecar("av", extraction=extraction))
    return Built(root, {"components": ("av",)})


def universal(world: World, root: Path) -> Built:
    sidecar = world.model_sidecar("av", variant="universal", depth_percentages=[25, 50, 75])
    del sidecar["extraction_layer_index"]
    world.write_av(root, sidecar)
    return Built(root, {"components": ("av",)})


def pickled_head(world: World, root: Path) -> Built:
    world.write_ar(root, world.model_sidecar("ar"))
    (root / "value_head.safetensors").unlink()
    torch.save({"weight": world.head.weight.detach()}, root / "value_head.pt")
    return Built(root, {"components": ("ar",)})


def lora_of_another_kind(world: World, root: Path) -> Built:
    world.write_base(root / "source")
    world.lora(35, use_dora=True, init_lora_weights=True).save_pretrained(root / "av")
    write_sidecar(root / "av", world.model_sidecar("av"))
    return Built(root, {"components": ("av",)})


def unsaid_norm(world: World, root: Path) -> Built:
    world.write_base(root / "base")
    world.write_ar_lora(root / "ar", world.lora(36), norm_stripped=None)
    write_sidecar(root / "ar", world.dataset_sidecar())
    return Built(root / "ar", {"components": ("ar",), "base_model": root / "base"})


LAYOUTS = (
    Layout(
        "two-directories", "`x-av/`, `x-ar/`: complete models, sidecar in each", "the released pairs", two_directories
    ),
    Layout(
        "one-directory",
        "`av/`, `ar/` in one checkpoint; roles actor and critic",
        "nla-hub, the paper's code",
        one_directory,
    ),
    Layout("sharded", "several `model-*.safetensors` with an index", "transformers", sharded),
    Layout(
        "dummy-head",
        "AR with a [d, d] `lm_head` and a norm of ones in an extra shard",
        "the released Llama AR",
        dummy_head,
    ),
    Layout("head-with-bias", "`value_head.safetensors` with weight and bias", "rare", head_with_bias),
    Layout(
        "normalized-head",
        "head that reads h * mse_scale / norm(h); `head_input: normalized`",
        "EasyNLA and nanoNLA, written out",
        normalized_head,
    ),
    Layout(
        "kept-norm",
        "head trained behind the final norm; `final_norm_stripped: false`",
        "EasyNLA before June 2026, merged",
        kept_norm,
    ),
    Layout(
        "raw-injection",
        "AV that gets the vector as it is; `injection_scale: null`",
        "some community AVs",
        raw_injection,
    ),
    Layout("added", "AV with norm-matched addition; `injection.kind: add`", "EasyNLA, nanoNLA, merged", added),
    Layout(
        "run-folders",
        "`iter_0000200/av`, `iter_0000200/ar` of several steps",
        "forks of the paper's code",
        run_folders,
        "`subfolder=`",
    ),
    Layout(
        "no-sidecar",
        "`av/`, `ar/` without `nla_meta.yaml`",
        "anybody",
        no_sidecar,
        "`sidecar=`: layer, templates, marker, scale",
    ),
    Layout(
        "peft-pair",
        "AV as a PEFT folder, AR as a PEFT folder with `value_head.safetensors`",
        "peft",
        peft_pair,
        "the base, where the sidecar has no Hub name",
    ),
    Layout(
        "easynla-sft",
        "PEFT AV; AR as `ar_lora_value_head.safetensors` with `ar_meta.json`; a data set's sidecar in both",
        "EasyNLA `train_sft`",
        easynla_sft,
        '`ar=`, and `sidecar={"injection": {"kind": "add"}}`',
    ),
    Layout(
        "easynla-rl", "`iter_000400/` (PEFT) with `critic/` inside, sidecar above", "EasyNLA, RL on one GPU", easynla_rl
    ),
    Layout(
        "critic-latest",
        "`iter_000400/` (PEFT) beside `critic_latest/` (complete), sidecar above",
        "EasyNLA, RL with vLLM",
        critic_latest,
    ),
    Layout(
        "stages",
        "`av_sft_lora/`, `av_rl_lora_step400/`, `ar_sft_critic/`, `rl_critic_step400/`; the RL LoRA acts on top",
        "forks of EasyNLA",
        stages,
        "`subfolder=`",
    ),
    Layout(
        "continued",
        "the same, where the RL LoRA continues the supervised one; AR LoRA without `ar_meta.json`",
        "forks of EasyNLA",
        continued,
        '`subfolder=`, and `sidecar={"ar_meta": ...}` for what is missing',
    ),
    Layout(
        "own-base",
        "LoRA on a merged AV in the same checkpoint",
        "forks of EasyNLA",
        own_base,
        '`subfolder=`, and `sidecar={"adapter_stack": [...]}`',
    ),
    Layout(
        "wrapper-base",
        "LoRA on the text stack of a multimodal model (Gemma 3)",
        "EasyNLA and others",
        wrapper_base,
    ),
    Layout("whitened", "`extraction.norm` other than none", "experiments", whitened, refused="extraction.norm"),
    Layout("universal", "one AV for many layers (`variant: universal`)", "experiments", universal, refused="variant"),
    Layout("pickled-head", "`value_head.pt`", "early scripts", pickled_head, refused="no value head"),
    Layout(
        "other-adapter",
        "DoRA, `modules_to_save`, other adapters than plain LoRA",
        "peft",
        lora_of_another_kind,
        refused="more than a plain LoRA",
    ),
    Layout(
        "unsaid-norm",
        "AR LoRA that does not say whether its head reads behind the final norm",
        "EasyNLA before June 2026",
        unsaid_norm,
        refused="final norm",
    ),
)
"""The rows of the table, in its order."""

HEAD = """<!-- Generated: python tests/wild.py > docs/layouts.md -->

# Layouts that are read

Each row is built small by the tests, loaded, compared with an independent computation, converted, loaded again and compared
again (`tests/test_layouts.py`). "Verifies" means that a load fails with a reason where a weight is missing, unexpected,
misshapen or not finite, where sidecar, config and tokenizer disagree, or where the vector does not reach the logits.
`nla-hub convert SRC DST` writes the first layout in its one-directory form.

| layout | files | who writes it | reads | verifies | converts |
|---|---|---|---|---|---|
"""

FOOT = """
Several folders that fit are listed in the message, and one is chosen by `subfolder=` (`--subfolder`) and `ar_subfolder=`
(`--ar-subfolder`). The AR belongs to the AV's own step or stage where a checkpoint holds several.

Whether a LoRA of reinforcement learning acts on top of the supervised one or in its place is not in its files. It is
measured: an adapter that continues another still has nearly the same factors, one begun anew has unrelated ones. Where
that is unclear, and where a complete model may lie under it, the load is refused and asks for `adapter_stack`: the folders that
act, in their order, the first perhaps a complete model. Where a LoRA lies on another model than the source, `adapter_base`
names it.

What a sidecar may say, in which dialect: [sidecar.md](sidecar.md).
"""


def page() -> str:
    """docs/layouts.md."""

    def row(layout: Layout) -> str:
        if layout.refused:
            cells = (f"refused: {layout.refused}", "-", "-")
        else:
            cells = (f"yes, with {layout.needs}" if layout.needs else "yes", "yes", "yes")
        return f"| {layout.key} | {layout.files} | {layout.writer} | {' | '.join(cells)} |\n"

    return HEAD + "".join(map(row, LAYOUTS)) + FOOT


if __name__ == "__main__":
    sys.stdout.write(page())
    shutil.rmtree("__pycache__", ignore_errors=True)
