"""Independent computations, and the parity checks made of them.

Nothing here uses nla_hub to compute what nla_hub is compared with: models are loaded by transformers or from the raw
safetensors, prompts are written out, rescaling runs in float64. Each `check_*` raises an AssertionError where the
implementation differs; tests/test_sabotage.py breaks the implementation and sees the check fail.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from nla_hub.engines import transformers as engine_module
from nla_hub.engines.base import Completion

if TYPE_CHECKING:
    from conftest import Case

NEAR_TIE = 1e-4
STEPS = 14
"""Long enough that the random Gemma's sliding window (32) has moved past the start of the prompt."""
TEXTS = (
    "the cat sees a house",
    "a story in the night: the red dog walks and walks, the small quick cat is where it was, and then of the river",
    "?",
    "who sees the blue house, the old river and a song of the night . what next , what last",
)


TRUNKS = {"gpt2": ("h", "ln_f"), "gpt_neox": ("layers", "final_layer_norm")}
"""Names of the blocks and of the final norm, where they are not the usual ones."""


def trunk_names(config: Any) -> tuple[str, str]:
    """What the family calls its blocks and its final norm."""
    return TRUNKS.get(config.model_type, ("layers", "norm"))


def close(got: Tensor, expected: Tensor) -> None:
    """The project's "equal" for tensors: max|a-b| <= 1e-5 max|b|."""
    assert got.shape == expected.shape
    assert torch.isfinite(got).all()
    worst = float((got.double() - expected.double()).abs().max() / expected.double().abs().max())
    assert worst <= 1e-5, f"relative difference {worst:.1e}"


def same_rows(
    got: Sequence[Sequence[int]], expected: Sequence[Sequence[int]], margins: Sequence[Sequence[float]]
) -> None:
    """The project's "equal" for rows: >= 95 % identical, and others only up to a near tie."""
    assert len(got) == len(expected) > 0
    different = 0
    for mine, theirs, margin in zip(got, expected, margins, strict=True):
        if list(mine) == list(theirs)[: len(mine)]:
            continue
        different += 1
        step = next(i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b)
        assert margin[step] < NEAR_TIE, f"differs at step {step} without a tie ({margin[step]:.1e}): {mine} / {theirs}"
    assert different <= 0.05 * len(got), f"{different} of {len(got)} rows differ"


# -- references ----------------------------------------------------------------------------------------------


class ReferenceAV:
    """An AV run on `inputs_embeds`, without a cache, without hooks (kind `add`: one hook, uncached)."""

    def __init__(self, directory: Path) -> None:
        self.meta = yaml.safe_load((directory / "nla_meta.yaml").read_text(encoding="utf-8"))
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        char = self.meta["tokens"]["injection_char"]
        content = self.meta["prompt_templates"]["av"].replace("{injection_char}", char)
        bos = self.tokenizer.bos_token or ""
        self.text = f"{bos}<|user|>\n{content}<|end|>\n<|assistant|>\n"
        if self.model.config.model_type == "qwen3":
            self.text += "<think>\n\n</think>\n\n"  # what its template writes for enable_thinking=False
        self.ids: list[int] = self.tokenizer(self.text, add_special_tokens=False)["input_ids"]
        self.marker_id = self.meta["tokens"]["injection_token_id"]
        self.at = self.ids.index(self.marker_id)

    def logits(self, vectors: Tensor, completions: Tensor) -> Tensor:
        """Next-token logits after the prompt and each completion token [N, T]: [N, T + 1, vocabulary]."""
        ids = torch.cat([torch.tensor(self.ids).expand(len(vectors), -1), completions], dim=1)
        unit = vectors.double() / vectors.double().norm(dim=-1, keepdim=True)
        with torch.no_grad():
            embeds = self.model.get_input_embeddings()(ids).clone()
            if self.meta["injection"]["kind"] == "overwrite":
                embeds[:, self.at] = (unit * self.meta["extraction"]["injection_scale"]).float()
                out = self.model(inputs_embeds=embeds, use_cache=False).logits
            else:

                def add(_module: Any, _args: Any, output: Any) -> Any:
                    hidden = (output[0] if isinstance(output, tuple) else output).clone()
                    here = hidden[:, self.at].double()
                    hidden[:, self.at] = (here + here.norm(dim=-1, keepdim=True) * unit).float()
                    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

                blocks = getattr(self.model.base_model, trunk_names(self.model.config)[0])
                handle = blocks[1].register_forward_hook(add)
                out = self.model(inputs_embeds=embeds, use_cache=False).logits
                handle.remove()
        return out[:, len(self.ids) - 1 :]

    def decode(
        self, vectors: Tensor, steps: int, draws: Tensor | None = None, temperature: float = 1.0
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Token ids of every row, never stopping, and the margin of each choice."""
        ids = torch.empty(len(vectors), 0, dtype=torch.long)
        margins = []
        for step in range(steps):
            logits = self.logits(vectors, ids)[:, -1].double()
            if draws is None:
                best = logits.log_softmax(-1).topk(2)
                token, margin = best.indices[:, 0], best.values[:, 0] - best.values[:, 1]
            else:
                edges = (logits / temperature).softmax(-1).cumsum(-1)
                u = draws[:, step : step + 1]
                token = (edges <= u).sum(-1).clamp(max=logits.shape[-1] - 1)
                margin = (edges - u).abs().amin(-1)
            ids = torch.cat([ids, token[:, None]], dim=1)
            margins.append(margin)
        return ids.tolist(), torch.stack(margins, dim=1).tolist()


class ReferenceAR:
    """An AR rebuilt from the raw safetensors with one block too many, so that `hidden_states[K+1]` is not normed."""

    def __init__(self, directory: Path) -> None:
        self.meta = yaml.safe_load((directory / "nla_meta.yaml").read_text(encoding="utf-8"))
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        config = AutoConfig.from_pretrained(directory)
        self.index = config.num_hidden_layers
        config.num_hidden_layers += 1
        if getattr(config, "layer_types", None):
            config.layer_types = [*config.layer_types, "full_attention"]
        self.model = AutoModel.from_config(config, attn_implementation="eager").eval()
        prefix = f"{self.model.base_model_prefix}."
        stored = load_file(directory / "model.safetensors")
        assert all(name.startswith(prefix) for name in stored)
        state = {name.removeprefix(prefix): value for name, value in stored.items()}
        missing, unexpected = self.model.load_state_dict(state, strict=False)
        assert not unexpected
        blocks, norm = trunk_names(config)
        assert all(name.startswith((f"{norm}.", f"{blocks}.{self.index}.")) for name in missing)
        self.head = load_file(directory / "value_head.safetensors")["weight"]

    def ids(self, explanation: str) -> list[int]:
        text = self.meta["prompt_templates"]["ar"].replace("{explanation}", explanation)
        bos = self.tokenizer.bos_token_id
        body = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ([] if bos is None else [bos]) + body

    def vector(self, explanation: str) -> Tensor:
        with torch.no_grad():
            out = self.model(
                input_ids=torch.tensor([self.ids(explanation)]), output_hidden_states=True, use_cache=False
            )
        return out.hidden_states[self.index][0, -1] @ self.head.T


class ReferenceSource:
    """The complete base model as transformers itself loads it (the multimodal wrapper where it is one)."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    def ids(self, text: str) -> list[int]:
        bos = self.tokenizer.bos_token_id
        body = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ([] if bos is None else [bos]) + body

    def hidden(self, ids: Sequence[int], index: int) -> Tensor:
        """`hidden_states[index]` of one sequence, alone and unpadded: [length, d]."""
        with torch.no_grad():
            out = self.model(input_ids=torch.tensor([list(ids)]), output_hidden_states=True, use_cache=False)
        return out.hidden_states[index][0]


# -- what the implementation says ----------------------------------------------------------------------------


def engine_logits(engine: Any, vectors: Tensor) -> Tensor:
    """The next-token logits that the engine chooses from."""
    seen: list[Tensor] = []
    choose = engine_module.choose

    def spy(logits: Tensor, draws: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
        seen.append(logits)
        return choose(logits, draws, temperature)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "choose", spy)
        engine.generate(vectors, None, temperature=1.0, max_new_tokens=1, batch_size=len(vectors))
    assert len(seen) == 1
    return seen[0]


def stops_rightly(completion: Completion, av: ReferenceAV, max_new_tokens: int) -> None:
    """A completion ends at the first EOS, closing tag or length bound, and says which."""
    eos = {av.tokenizer.eos_token_id, av.model.generation_config.eos_token_id}
    assert not eos & set(completion.ids[:-1])
    texts = [av.tokenizer.decode(completion.ids[: i + 1], skip_special_tokens=True) for i in range(len(completion.ids))]
    assert all("</explanation>" not in text for text in texts[:-1])
    if completion.ids[-1] in eos:
        assert completion.finish == "eos"
    elif "</explanation>" in texts[-1]:
        assert completion.finish == "tag"
    else:
        assert (completion.finish, len(completion.ids)) == ("length", max_new_tokens)
    assert completion.text == texts[-1]
    assert completion.logprobs.shape == (len(completion.ids),)


# -- checks --------------------------------------------------------------------------------------------------


def check_logits(case: Case, vectors: Tensor) -> None:
    """Next-token logits under injected vectors."""
    expected = case.av.logits(vectors, torch.empty(len(vectors), 0, dtype=torch.long))[:, -1]
    close(engine_logits(case.nla.av.engine, vectors), expected)


def check_generation(case: Case, vectors: Tensor, *, draws: Tensor | None = None, steps: int = STEPS) -> None:
    """Greedy or drawn tokens for every batch size, with their log-probabilities."""
    temperature = 1.0 if draws is None else 0.8
    ids, margins = case.av.decode(vectors, steps, draws, temperature)
    for batch_size in (1, 3, 7):
        found = case.nla.av.engine.generate(
            vectors, draws, temperature=temperature, max_new_tokens=steps, batch_size=batch_size
        )
        same_rows([c.ids for c in found], ids, margins)
        for completion in found:
            stops_rightly(completion, case.av, steps)
    teacher = case.av.logits(vectors, torch.tensor([[*c.ids, *[0] * (steps - len(c.ids))] for c in found]))
    logprobs = (teacher / temperature).log_softmax(-1)
    for row, completion in enumerate(found):
        expected = torch.stack([logprobs[row, i, token] for i, token in enumerate(completion.ids)])
        assert torch.allclose(completion.logprobs, expected, atol=1e-4, rtol=0)


def check_capture(case: Case) -> None:
    """Every position of texts of different lengths in one batch, against unpadded `hidden_states[K+1]`."""
    acts = case.nla.capture(list(TEXTS), positions="all", batch_size=len(TEXTS))
    row = 0
    for i, text in enumerate(TEXTS):
        ids = case.source.ids(text)
        rows = slice(row, row + len(ids))
        assert acts.document[rows] == (i,) * len(ids)
        assert acts.position[rows] == tuple(range(len(ids)))
        close(acts.vectors[rows], case.source.hidden(ids, case.pair.site.layer + 1))
        row += len(ids)
    assert row == len(acts)


def check_reconstruct(case: Case) -> None:
    """Texts of different lengths in one batch, against one text at a time."""
    got = case.nla.reconstruct(list(TEXTS), batch_size=len(TEXTS))
    close(got, torch.stack([case.ar.vector(text) for text in TEXTS]))


def check_neighbours(case: Case) -> None:
    """A marker counts only between its neighbours, only in the prompt, and exactly once."""
    from nla_hub.errors import InjectionError
    from nla_hub.injection import find_markers

    marker = case.nla.sidecar.marker
    assert marker is not None
    m, a, b, x = marker.id, marker.left_id, marker.right_id, marker.right_id + 1
    assert len({m, a, b, x}) == 4
    ids = torch.tensor([[x, m, x, a, m, b], [a, m, b, x, m, b], [m, a, m, b, a, m]])
    assert find_markers(ids, marker).tolist() == [4, 1, 2]
    for wrong in (
        [x, m, b, x],
        [a, m, x, x],
        [a, b, x, m],
        [m, b, x, x],
        [x, x, a, m],
        [x, x, x, x],
        [a, m, b, a, m, b],
    ):
        with pytest.raises(InjectionError, match=r"holds \d valid injection markers"):
            find_markers(torch.tensor([wrong]), marker)
    assert find_markers(torch.tensor([[a, m, b, a, m, b]]), marker, prompt_length=4).tolist() == [1]
