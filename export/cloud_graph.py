"""The cloud half as modules that TorchScript can compile: segments of decoder layers, the KV cache an argument.

A batch is packed: the new tokens of all its rows one behind the other, N in all, so that a prompt's chunk and another session's one token
share every product, and nothing is padded. Attention alone is each row's own, over its own cache, as if it were alone.

Shapes: H hidden, N new tokens of all rows, T of one row, L its cached and new tokens. Dtype: that of the weights. Behind the new tokens
there may be padding, which is computed and means nothing: some numbers of rows have better kernels than others.

    segment.open(hidden)  -> u, compressed      what the exchange sends, as early as it is known
    segment.ahead(u)      -> qkv                what can be computed while it is in flight
    segment.run(...)      -> hidden             the rest, once the injections are here
    segment.through(...)  -> hidden             all of it, where no exchange starts the segment
    graph(...)            -> hidden             a whole step, where the plan has one segment and no exchange

Decoder: Llama (arXiv 2302.13971), grouped-query attention (arXiv 2305.13245), rope (arXiv 2104.09864).
"""

from __future__ import annotations

from typing import Dict, List, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..artifact.shape import DecoderShape

FIRST_MASK = 4
"""Where the masks start in the list that CloudGraph.tables returns, row by row (TorchScript sees no named constants of a module)."""


class UpProjection(nn.Module):
    """Adds s · B (M A u) to one target's columns of a projection's output, in place."""

    def __init__(self, weight: Tensor, position: int, start: int, offset: int) -> None:
        super().__init__()
        self.weight = weight  # s · B  [out, out_rank]
        self.position = position  # of its exchange among the segment's inputs
        self.start = start
        self.columns = weight.shape[1]
        self.offset = offset
        self.width = weight.shape[0]

    def forward(self, y: Tensor, injections: List[Tensor]) -> Tensor:
        injection = injections[self.position].narrow(-1, self.start, self.columns)
        y.narrow(-1, self.offset, self.width).add_(F.linear(injection, self.weight))
        return y


class Expansion(nn.Module):
    """What one segment needs of an exchange's injection: where it is shared, sign · value at each column's place, else all of it."""

    def __init__(self, places: Tensor, signs: Tensor) -> None:
        super().__init__()
        self.places = places  # int64 [columns of this segment], or empty
        self.signs = signs
        self.shared = len(places) > 0

    def forward(self, injection: Tensor) -> Tensor:
        return injection.index_select(-1, self.places) * self.signs if self.shared else injection


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + ε) · weight, the mean in fp32 (arXiv 1910.07467)."""

    def __init__(self, weight: Tensor, epsilon: float) -> None:
        super().__init__()
        self.weight = weight
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return self.weight * wide.to(x.dtype)


class Projection(nn.Module):
    """x Wᵀ + b, of one matrix or of several side by side, W [out, in]; x [N, in].

    More than one row in fp32 are computed as (W xᵀ)ᵀ, for which MKL has the better kernels: with two threads, 2 or 4 rows take the time of
    one, 16 that of two, where F.linear takes 2.3 and 2.4 times as long as for one (docs/load.md). In 16 bits there is nothing to gain.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.wide = weight.dtype == torch.float32

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 1 or not self.wide:
            return F.linear(x, self.weight, self.bias)
        y = torch.mm(self.weight, x.t()).t().contiguous()
        return y if self.bias is None else y.add_(self.bias)


class Layer(nn.Module):
    """One decoder layer; q/k/v and gate/up are one matrix each. Its injections come from any exchange so far.

    projections, ups: by matrix ("qkv", "o", "gate_up", "down"); place: of the layer in its segment; mask: of the first row's mask for its
    window among the tables; windows: masks of a row.
    """

    def __init__(
        self,
        norms: Tuple[Tensor, Tensor],
        projections: Dict[str, Projection],
        ups: Dict[str, List[UpProjection]],
        place: int,
        mask: int,
        windows: int,
        window: int,
        shape: DecoderShape,
    ) -> None:
        super().__init__()
        self.heads = shape.heads
        self.kv_heads = shape.kv_heads
        self.head_dim = shape.head_dim
        self.scale = shape.head_dim**-0.5
        self.wide = projections["qkv"].wide
        self.window = window
        self.query_width = shape.query_width
        self.kv_width = shape.kv_width
        self.place = place
        self.mask = mask
        self.windows = windows
        self.input_norm = RMSNorm(norms[0], shape.epsilon)
        self.mlp_norm = RMSNorm(norms[1], shape.epsilon)
        self.qkv = projections["qkv"]
        self.o = projections["o"]
        self.gate_up = projections["gate_up"]
        self.down = projections["down"]
        self.qkv_ups = nn.ModuleList(ups["qkv"])
        self.o_ups = nn.ModuleList(ups["o"])
        self.gate_up_ups = nn.ModuleList(ups["gate_up"])
        self.down_ups = nn.ModuleList(ups["down"])

    def project(self, u: Tensor) -> Tensor:
        """u [N, H] -> q, k and v side by side, before any injection."""
        return self.qkv(u)

    def forward(
        self,
        hidden: Tensor,
        qkv: Tensor,
        injections: List[Tensor],
        tables: List[Tensor],
        slots: List[int],
        lengths: List[int],
        counts: List[int],
        keys: List[Tensor],
        values: List[Tensor],
    ) -> Tensor:
        for up in self.qkv_ups:
            qkv = up(qkv, injections)
        attended = self.attend(qkv, tables, slots, lengths, counts, keys[self.place], values[self.place])
        y = self.o(attended)
        for up in self.o_ups:
            y = up(y, injections)
        hidden = hidden + y
        y = self.gate_up(self.mlp_norm(hidden))
        for up in self.gate_up_ups:
            y = up(y, injections)
        gate, linear = y.chunk(2, -1)
        y = self.down(F.silu(gate) * linear)
        for up in self.down_ups:
            y = up(y, injections)
        return hidden + y

    def attend(
        self,
        qkv: Tensor,
        tables: List[Tensor],
        slots: List[int],
        lengths: List[int],
        counts: List[int],
        keys: Tensor,
        values: Tensor,
    ) -> Tensor:
        """Rope, cache write, attention. keys, values: one layer's pool [slots, kv_heads, capacity, head_dim]."""
        groups = self.heads // self.kv_heads
        qk, v = qkv.split([self.query_width + self.kv_width, self.kv_width], -1)
        qk = qk.view(-1, self.heads + self.kv_heads, self.head_dim)
        cos, sin = tables[0], tables[1]
        qk = torch.addcmul(qk * cos, qk.roll(self.head_dim // 2, -1), sin)
        q, k = qk.split([self.heads, self.kv_heads], 1)
        N = tables[2].shape[0]  # without padding
        k, v = k.narrow(0, 0, N), v.view(-1, self.kv_heads, self.head_dim).narrow(0, 0, N)
        if len(slots) == 1:
            keys.select(0, slots[0]).narrow(1, lengths[0], counts[0]).copy_(k.transpose(0, 1))
            values.select(0, slots[0]).narrow(1, lengths[0], counts[0]).copy_(v.transpose(0, 1))
        else:
            keys.transpose(1, 2)[tables[2], tables[3]] = k
            values.transpose(1, 2)[tables[2], tables[3]] = v
        attended: List[Tensor] = []
        start = 0
        for row in range(len(slots)):
            T, seen = counts[row], lengths[row] + counts[row]
            own_keys, own_values = keys.select(0, slots[row]).narrow(1, 0, seen), values.select(0, slots[row]).narrow(1, 0, seen)
            # The queries that share a key head stand side by side as [kv_heads, groups · T, head_dim]: no key is copied.
            own = q.narrow(0, start, T)
            if T == 1 and self.wide and (self.window == 0 or seen <= self.window):
                scores = torch.bmm(own.view(self.kv_heads, groups, self.head_dim) * self.scale, own_keys.transpose(1, 2))
                attended.append(torch.bmm(scores.softmax(-1), own_values).view(1, self.query_width))
            else:
                own = (
                    own.view(T, self.kv_heads, groups, self.head_dim)
                    .permute(1, 2, 0, 3)
                    .reshape(1, self.kv_heads, groups * T, self.head_dim)
                )
                mask = tables[self.mask + row * self.windows]
                y = F.scaled_dot_product_attention(own, own_keys[None], own_values[None], attn_mask=mask if mask.numel() > 0 else None)
                y = y.view(self.kv_heads, groups, T, self.head_dim)
                attended.append(y.permute(2, 0, 1, 3).reshape(T, self.query_width))
            start += T
        if start < q.shape[0]:
            attended.append(q.new_zeros([q.shape[0] - start, self.query_width]))
        return attended[0] if len(attended) == 1 else torch.cat(attended)


class SegmentGraph(nn.Module):
    """Layers that run without the network. The first one's input norm is the u of the exchange that starts the segment."""

    def __init__(self, layers: List[Layer], down: Tensor, expansions: List[Expansion]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.expansions = nn.ModuleList(expansions)  # one per input
        self.norm = layers[0].input_norm
        self.first: Layer = layers[0]
        self.down = down  # every A of the source, stacked [C, H]

    @torch.jit.export
    def open(self, hidden: Tensor) -> Tuple[Tensor, Tensor]:
        """hidden [N, H] -> (u [N, H], compressed [N, C])."""
        u = self.norm(hidden)
        return u, F.linear(u, self.down)

    @torch.jit.export
    def ahead(self, u: Tensor) -> Tensor:
        """u [N, H] -> the first layer's q, k, v before injections."""
        return self.first.project(u)

    def forward(
        self,
        hidden: Tensor,
        qkv: Tensor,
        injections: List[Tensor],
        tables: List[Tensor],
        slots: List[int],
        lengths: List[int],
        counts: List[int],
        keys: List[Tensor],
        values: List[Tensor],
    ) -> Tensor:
        """injections: of the segment's inputs, each [N, I]. slots, lengths, counts: of each row the pool slot, tokens cached so far, new
        tokens. keys, values: the pools of the segment's layers, into which the new tokens are written. Returns hidden [N, H].
        """
        expanded: List[Tensor] = []
        for index, expansion in enumerate(self.expansions):
            expanded.append(expansion(injections[index]))
        first = True
        for layer in self.layers:
            if not first:
                qkv = layer.project(layer.input_norm(hidden))  # pyright: ignore[reportCallIssue]  a ModuleList of Layer
            first = False
            hidden = layer(hidden, qkv, expanded, tables, slots, lengths, counts, keys, values)
        return hidden

    @torch.jit.export
    def through(
        self,
        hidden: Tensor,
        injections: List[Tensor],
        tables: List[Tensor],
        slots: List[int],
        lengths: List[int],
        counts: List[int],
        keys: List[Tensor],
        values: List[Tensor],
    ) -> Tensor:
        """The whole segment, where nothing is sent at its start. Arguments as for `forward`."""
        return self.forward(hidden, self.first.project(self.norm(hidden)), injections, tables, slots, lengths, counts, keys, values)


class CloudGraph(nn.Module):
    """All segments, and the tables that a step needs once: rope, masks, and where new tokens are written."""

    def __init__(self, segments: List[SegmentGraph], windows: List[int], shape: DecoderShape) -> None:
        super().__init__()
        self.segments = nn.ModuleList(segments)
        self.windows = windows
        self.groups = shape.heads // shape.kv_heads
        self.scaling = shape.rope.attention_scaling
        self.register_buffer("inv_freq", torch.tensor(shape.rope.inv_freq))

    @torch.jit.export
    def tables(self, slots: List[int], lengths: List[int], counts: List[int], like: Tensor) -> List[Tensor]:
        """slots, lengths, counts: of each row the pool slot, tokens cached, new tokens. like [N and padding, H]: dtype and device.

        Returns cos and sin (signed for a rotation by half) [N, 1, D]; slot and position of each new token [N]; then row by row one mask
        [groups · T, L] per window, empty where a single token sees everything.
        """
        own_slots: List[Tensor] = []
        own_positions: List[Tensor] = []
        for row in range(len(slots)):
            own_slots.append(torch.full([counts[row]], slots[row], dtype=torch.int64, device=like.device))
            own_positions.append(torch.arange(lengths[row], lengths[row] + counts[row], device=like.device))
        positions = torch.cat(own_positions)
        angles = F.pad(positions.float(), [0, like.shape[0] - len(positions)])
        angles = (angles[:, None] * self.inv_freq)[:, None]  # pyright: ignore[reportOperatorIssue]  a buffer
        cos, sin = angles.cos() * self.scaling, angles.sin() * self.scaling
        tables = [torch.cat([cos, cos], -1).to(like.dtype), torch.cat([-sin, sin], -1).to(like.dtype), torch.cat(own_slots), positions]
        for row in range(len(slots)):
            seen = lengths[row] + counts[row]
            for window in self.windows:
                if counts[row] == 1 and (window == 0 or seen <= window):
                    tables.append(torch.empty(0, dtype=torch.bool, device=like.device))
                else:
                    own, keys = own_positions[row][:, None], torch.arange(seen, device=like.device)
                    mask = keys <= own
                    if window > 0:
                        mask = mask & (keys > own - window)
                    tables.append(mask.repeat(self.groups, 1))
        return tables

    def forward(
        self,
        hidden: Tensor,
        injections: List[Tensor],
        slots: List[int],
        lengths: List[int],
        counts: List[int],
        keys: List[Tensor],
        values: List[Tensor],
    ) -> Tensor:
        """A whole step in one call, for a plan with one segment and no exchange: hidden [N, H] -> exit [N, H]."""
        tables = self.tables(slots, lengths, counts, hidden)
        for segment in self.segments:  # there is one
            hidden = segment.through(hidden, injections, tables, slots, lengths, counts, keys, values)  # pyright: ignore[reportCallIssue]
        return hidden
