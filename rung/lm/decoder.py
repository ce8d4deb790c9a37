"""The decoder: an embedding, a tuple of blocks, a final norm and a head.  Meets `protocols.ModelDecoder`."""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import nn
from torch.nn.utils import skip_init
from torch.utils.checkpoint import checkpoint

from rung.core.errors import ConfigError
from rung.core.records import Layout
from rung.core.shapes import Float, Int, Tensor
from rung.lm.block import Block
from rung.lm.config import AttentionSpec, DecoderConfig
from rung.lm.linear import KeptBlocks, Linear
from rung.lm.mixers.attention import Plan
from rung.lm.mixers.static import StaticPlan
from rung.lm.norm import RMSNorm
from rung.lm.protocols import Footprint, StaticStep
from rung.lm.rope import rotary_tables
from rung.lm.state import KVState
from rung.objectives.logprobs import softcapped

INIT_STD = 0.02  # of weights and embeddings  [GPT-2; Llama's initializer_range]


class Decoder(nn.Module):
    """Tokens on a flat axis to hidden states.  Parameters are uninitialised until loaded or drawn by `init_`.

    activation_checkpointing: for the backward pass a block keeps its input alone, and is computed again there: the same
    operations on the same numbers.  [Chen 2016]"""

    def __init__(
        self, config: DecoderConfig, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.config, self.max_positions = config, config.max_positions
        place = torch.device(device or "cpu")
        self.embedding = skip_init(nn.Embedding, config.vocab_size, config.width, dtype=dtype, device=place)
        blocks = [Block(spec, config.width, dtype, place) for spec in config.blocks]
        self.blocks = nn.ModuleList(blocks)
        self.branches = all(block.mixer.branches for block in blocks)  # may a layout hold trees, or chains only?
        self.norm = RMSNorm(config.width, config.norm_eps, dtype, place, config.norm)
        self.unembedding = None if config.tied else Linear(config.width, config.vocab_size, False, dtype, place)
        self.kept_head = KeptBlocks()
        self.logit_softcap = config.logit_softcap
        self.activation_checkpointing = False

    @torch.no_grad()
    def init_(self, generator: torch.Generator) -> "Decoder":
        """Draw matrices from N(0, 0.02^2), make norms neutral and biases zero; returns self."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, INIT_STD, generator=generator)
            else:
                parameter.zero_()
        for module in self.modules():
            if isinstance(module, RMSNorm):
                module.weight.fill_(module.neutral)
        return self

    def forward(self, tokens_T: Int[Tensor, "T"], layout: Layout, state: KVState | None = None) -> Float[Tensor, "T D"]:
        """Hidden states after the final norm, in the compute dtype.

        With a state nothing is differentiated, and the new rows stay pending until `state.commit`."""
        if torch.is_grad_enabled():
            self.kept_head.forget()  # a learner multiplies by `head_weight()` itself, and will change it
        if state is None:
            return self._through_blocks(tokens_T, layout, None)
        with torch.no_grad():
            return self._through_blocks(tokens_T, layout, state)

    def static_step(self, state: KVState) -> StaticStep:
        """See `protocols.StaticDecoder`."""
        state.settle()
        specs, position_C = {block.mixer for block in self.config.blocks}, torch.arange(state.capacity)
        tables = {spec: rotary_tables(spec, position_C, self.embedding.weight) for spec in specs}

        @torch.no_grad()
        def step(token_R: Tensor, slot_R: Tensor, position_R: Tensor, rows: int) -> Tensor:
            plans = {s: StaticPlan.build(s, table, slot_R, position_R, rows) for s, table in tables.items()}
            return self._planned(token_R, plans, state)

        return step

    def _through_blocks(self, tokens_T: Tensor, layout: Layout, state: KVState | None) -> Tensor:
        new = None if state is None else state.place(layout)
        blocks = cast(Sequence[Block], self.blocks)
        mixers = {block.mixer.spec: block.mixer for block in blocks}
        plans = {spec: mixer.plan(layout, new) for spec, mixer in mixers.items()}
        return self._planned(tokens_T, plans, state)

    def _planned(self, tokens_T: Tensor, plans: Mapping[AttentionSpec, Plan], state: KVState | None) -> Tensor:
        blocks = cast(Sequence[Block], self.blocks)
        x_TD = self.embedding(tokens_T)
        if self.config.embedding_scale != 1.0:  # rounded as Gemma does
            x_TD = x_TD * float(torch.tensor(self.config.embedding_scale, dtype=torch.float32).to(x_TD.dtype))
        again = self.activation_checkpointing and torch.is_grad_enabled()
        for layer, block in enumerate(blocks):
            given = (x_TD, plans[block.mixer.spec], None if state is None else state.rows[layer])
            x_TD = checkpoint(block, *given, use_reentrant=False, preserve_rng_state=False) if again else block(*given)
        return self.norm(x_TD)

    def head(self, hidden_ND: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """Logits in the compute dtype."""
        logits_NV = self.kept_head.linear(hidden_ND, self.head_weight())
        return softcapped(logits_NV, self.logit_softcap) if self.logit_softcap else logits_NV

    def head_weight(self) -> Float[Tensor, "V D"]:
        """The head's matrix: the embedding itself where the two are tied."""
        return self.embedding.weight if self.unembedding is None else self.unembedding.weight

    def new_state(self, slots: int, capacity: int) -> KVState:
        """An empty state in the compute dtype."""
        shapes = {(block.mixer.kv_heads, block.mixer.head_dim) for block in self.config.blocks}
        if len(shapes) > 1:
            raise ConfigError(
                f"one cache holds all layers: kv_heads and head_dim must be equal in all blocks; got {shapes}"
            )
        (kv_heads, head_dim), weight = shapes.pop(), self.embedding.weight
        return KVState(
            layers=len(self.blocks),
            slots=slots,
            kv_heads=kv_heads,
            capacity=capacity,
            head_dim=head_dim,
            dtype=weight.dtype,
            device=weight.device,
        )

    def footprint(self) -> Footprint:
        """Counted from the config; see `protocols.Footprint`."""
        cached = activations = 0
        for block in self.config.blocks:
            mixer = block.mixer
            qk = (mixer.heads + mixer.kv_heads) * mixer.head_dim
            norms = 6 if block.norms == "both" else 4  # of the width: what norms and the matrices behind them keep
            cached += 2 * mixer.kv_heads * mixer.head_dim
            activations += norms * self.config.width + (2 if mixer.qk_norm == "none" else 3) * qk
            activations += 3 * block.channel.width
        return Footprint(
            parameters=sum(parameter.numel() for parameter in self.parameters()),
            cached=cached,
            activations=activations,
            blocks=len(self.blocks),
            vocab_size=self.config.vocab_size,
            width=self.config.width,
        )
