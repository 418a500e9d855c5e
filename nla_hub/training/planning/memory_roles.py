"""Bytes of one half under training in one process, by what they are for: weights, gradients, moments, gathered weights,
activations. The arithmetic of `memory.py`; every figure is for one device unless it says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from nla_hub.architecture import Architecture

FLOAT32 = 4
"""Bytes: what is trained is trained in float32, see `loop.TRAINED`; and LoRA factors and value heads always are."""

MOMENTS = 2
"""Values that AdamW keeps for each trained one (Loshchilov and Hutter 2019)."""

PREFETCHED = 2
"""Gathered blocks at once under FSDP2: the one that computes, and the next, which is gathered meanwhile."""

TILE = 4096, 32768
"""Tokens and vocabulary entries that TRL's log-probability pass projects at once (`trl.kernels.chunked_logprob`, 1.16)."""

ROLES = (
    "source",
    "av",
    "reference",
    "ar",
    "watching_ar",
    "gradients",
    "moments",
    "gathered",
    "rollouts",
    "activations",
)
"""What bytes can be for, in the order in which they are shown."""


@dataclass(frozen=True)
class StageBytes:
    """What one stage needs at once.

    Attributes:
        name: the stage.
        roles: role -> bytes on each device; roles that need none are left out. "av", "ar", "watching_ar" and "source" are
            weights. "gathered" is what is whole for a moment although it is stored in pieces or in another dtype; "activations"
            the hungriest moment's working memory.
        main_memory: bytes of main memory on each node, of what does not stay on a device.
        moment: when they are needed, or how models are placed so that they fit; "" where nothing is to be said.
    """

    name: str
    roles: Mapping[str, int] = field(default_factory=dict)
    main_memory: int = 0
    moment: str = ""

    @property
    def total(self) -> int:
        """Bytes on each device."""
        return sum(self.roles.values())


@dataclass(frozen=True)
class Moment:
    """What a moment of a stage needs on a device beside weights and the optimizer's moments, in bytes."""

    name: str
    gradients: int
    gathered: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.gradients + self.gathered + self.activations


@dataclass(frozen=True)
class Half:
    """One half as it is trained, before it is divided.

    Attributes:
        frozen: bytes of the base that lies still under factors; 0 where all weights are trained.
        trained: values that are trained, in float32.
        values: values of the complete half, trained or not.
        block: values of its largest block. root: values outside blocks: embedding, lm_head, value head.
        architecture: its sizes.
        norms: RMS norms of a block that are as wide as the residual stream.
        adapted: sum of the input widths of a block's linear layers that carry factors.
        sharded: divided over all processes.
        offloaded: kept in main memory between uses; only what is sharded can be.
    """

    frozen: int
    trained: int
    values: int
    block: int
    root: int
    architecture: Architecture
    norms: int = 2
    adapted: int = 0
    sharded: bool = False
    offloaded: bool = False

    def part(self, whole: float, world: int) -> int:
        """What one of `world` processes keeps of `whole` bytes."""
        return math.ceil(whole / world) if self.sharded else math.ceil(whole)

    def weights(self, world: int) -> int:
        """Bytes of weights, frozen ones included."""
        return self.part(self.frozen + FLOAT32 * self.trained, world)

    def gradients(self, world: int) -> int:
        """Bytes of gradients."""
        return self.part(FLOAT32 * self.trained, world)

    def moments(self, world: int) -> int:
        """Bytes of the optimizer's moments."""
        return self.part(MOMENTS * FLOAT32 * self.trained, world)

    def gathered(self, width: int) -> int:
        """Bytes beside the weights as they are stored while a forward and backward pass runs.

        Sharded: `PREFETCHED` blocks in the dtype that computes (`width`), and a block's gradient in float32, in which it is
        added up; what is outside blocks stays gathered through the pass, in float32 as TRL takes the lm_head, with its
        gradient. Of a frozen base its own bytes, and no gradient. Not sharded: the copies of float32 weights in 16 bits that
        autocast keeps.
        """
        if not self.sharded:
            return width * self.trained if width < FLOAT32 and not self.frozen else 0
        if self.frozen:
            return math.ceil(self.frozen / self.values * (self.root + PREFETCHED * self.block))
        return PREFETCHED * width * self.block + FLOAT32 * self.block + 2 * FLOAT32 * self.root

    def buckets(self, world: int) -> int:
        """Bytes of the buckets in which data parallelism adds gradients up; they are kept."""
        return FLOAT32 * self.trained if world > 1 and not self.sharded else 0

    def per_token(self, width: int, *, checkpointing: bool) -> int:
        """Bytes of activations that a backward pass needs for one token."""
        return training_bytes_per_token(
            self.architecture, width=width, norms=self.norms, adapted=self.adapted, checkpointing=checkpointing
        )


def training_bytes_per_token(
    architecture: Architecture, *, width: int = FLOAT32, norms: int = 2, adapted: int = 0, checkpointing: bool = False
) -> int:
    """Bytes of activations that a backward pass needs for one token, over all blocks.

    Of a block whose weights are trained: for each of its `norms` the value widened to float32, normed and scaled (12 d); its
    input, in float32 as autocast leaves the residual stream; queries, keys and values before and after their rotation and
    repetition, and attention's output (4 heads + 3 kv_heads, times head_dim); gate, its activation, up and their product
    (4 mlp); these in `width` bytes. Where factors lie on frozen weights (`adapted`: the sum of the widths that they read): what
    they read in `width` bytes; of a norm the widened and the normed value, and no product of the MLP beside it, for frozen
    weights need no inputs. With checkpointing only each block's input is kept, and one block at a time is computed again,
    whose gradients are as large as what it keeps.
    """
    a = architecture
    attention = (4 * a.heads + 3 * a.kv_heads) * a.head_dim
    if adapted:
        block = norms * (FLOAT32 + width) * a.d_model + width * (attention + 3 * a.mlp + adapted)
    else:
        block = FLOAT32 * (3 * norms + 1) * a.d_model + width * (attention + 4 * a.mlp)
    return a.n_blocks * FLOAT32 * a.d_model + 2 * block if checkpointing else a.n_blocks * block


def label_logits(rows: int, text: int, vocabulary: int) -> int:
    """Bytes of fine-tuning's logits at `text` places a row: in float32, their log-softmax, and its gradient."""
    return 3 * FLOAT32 * rows * text * vocabulary


def tiled_logits(rows: int, text: int, vocabulary: int) -> int:
    """Bytes of the same where TRL goes through them tile by tile."""
    tokens, entries = TILE
    return 3 * FLOAT32 * min(rows * text, tokens) * min(vocabulary, entries)
