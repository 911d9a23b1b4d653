"""The cloud half as modules that TorchScript can compile: segments of decoder layers, the KV cache an argument.

Shapes: B sessions, T new tokens (the longest row's), H hidden, L cached + new tokens. Dtype: that of the weights.

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

FIRST_MASK = 5
"""Where the masks start in the list that CloudGraph.tables returns (TorchScript sees no named constants of a module)."""


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
    """x Wᵀ + b, of one matrix or of several side by side, W [out, in].

    A wide matrix in fp32 is kept turned, [in, out]: MKL reads it a third faster for one token, and no slower for many. In 16 bits it
    is not: there the turned product takes ten times as long (docs/benchmarks.md).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.turned = weight.dtype == torch.float32 and weight.shape[0] > weight.shape[1]
        self.weight = weight.t().contiguous() if self.turned else weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.t() if self.turned else self.weight, self.bias)


class Layer(nn.Module):
    """One decoder layer; q/k/v and gate/up are one matrix each. Its injections come from any exchange so far.

    projections, ups: by matrix ("qkv", "o", "gate_up", "down"); place: of the layer in its
    segment; mask: of its window's mask among the tables.
    """

    def __init__(
        self,
        norms: Tuple[Tensor, Tensor],
        projections: Dict[str, Projection],
        ups: Dict[str, List[UpProjection]],
        place: int,
        mask: int,
        shape: DecoderShape,
    ) -> None:
        super().__init__()
        self.heads = shape.heads
        self.kv_heads = shape.kv_heads
        self.head_dim = shape.head_dim
        self.query_width = shape.query_width
        self.kv_width = shape.kv_width
        self.place = place
        self.mask = mask
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
        """u [B, T, H] -> q, k and v side by side, before any injection."""
        return self.qkv(u)

    def forward(
        self,
        hidden: Tensor,
        qkv: Tensor,
        injections: List[Tensor],
        tables: List[Tensor],
        slots: Tensor,
        lengths: Tensor,
        keys: List[Tensor],
        values: List[Tensor],
    ) -> Tensor:
        for up in self.qkv_ups:
            qkv = up(qkv, injections)
        attended = self.attend(qkv, tables, slots, lengths, keys[self.place], values[self.place])
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

    def attend(self, qkv: Tensor, tables: List[Tensor], slots: Tensor, lengths: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Rope, cache write, attention. keys, values: one layer's pool [slots, kv_heads, capacity, head_dim]."""
        B, T = qkv.shape[0], qkv.shape[1]
        groups = self.heads // self.kv_heads
        qk, v = qkv.split([self.query_width + self.kv_width, self.kv_width], -1)
        qk = qk.view(B, T, self.heads + self.kv_heads, self.head_dim)
        cos, sin, rows, row_slots, row_positions = tables[0], tables[1], tables[2], tables[3], tables[4]
        qk = torch.addcmul(qk * cos, qk.roll(self.head_dim // 2, -1), sin)
        q, k = qk.split([self.heads, self.kv_heads], 2)
        v = v.view(B, T, self.kv_heads, self.head_dim)
        if B == 1:
            slot, length = int(slots), int(lengths)
            own_keys, own_values = keys.narrow(0, slot, 1), values.narrow(0, slot, 1)
            own_keys.narrow(2, length, T).copy_(k.transpose(1, 2))
            own_values.narrow(2, length, T).copy_(v.transpose(1, 2))
            seen = length + T
        else:
            keys.transpose(1, 2)[row_slots, row_positions] = k.flatten(0, 1)[rows]
            values.transpose(1, 2)[row_slots, row_positions] = v.flatten(0, 1)[rows]
            own_keys, own_values = keys[slots], values[slots]
            seen = tables[self.mask].shape[-1]
        # The queries that share a key head stand side by side as [B, kv_heads, groups · T, head_dim]: no key is copied.
        q = q.view(B, T, self.kv_heads, groups, self.head_dim).permute(0, 2, 3, 1, 4).reshape(B, self.kv_heads, groups * T, self.head_dim)
        mask = tables[self.mask]
        y = F.scaled_dot_product_attention(
            q, own_keys.narrow(2, 0, seen), own_values.narrow(2, 0, seen), attn_mask=mask if mask.numel() > 0 else None
        )
        return y.view(B, self.kv_heads, groups, T, self.head_dim).permute(0, 3, 1, 2, 4).reshape(B, T, self.query_width)


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
        """hidden [B, T, H] -> (u [B, T, H], compressed [B, T, C])."""
        u = self.norm(hidden)
        return u, F.linear(u, self.down)

    @torch.jit.export
    def ahead(self, u: Tensor) -> Tensor:
        """u [B, T, H] -> the first layer's q, k, v before injections."""
        return self.first.project(u)

    def forward(
        self,
        hidden: Tensor,
        qkv: Tensor,
        injections: List[Tensor],
        tables: List[Tensor],
        slots: Tensor,
        lengths: Tensor,
        keys: List[Tensor],
        values: List[Tensor],
    ) -> Tensor:
        """injections: of the segment's inputs, each [B, T, I]. keys, values: the pools of the segment's layers, into which the new
        tokens are written.

        slots, lengths: int64 [B], the rows' pool slots and tokens cached so far. Returns hidden [B, T, H].
        """
        expanded: List[Tensor] = []
        for index, expansion in enumerate(self.expansions):
            expanded.append(expansion(injections[index]))
        first = True
        for layer in self.layers:
            if not first:
                qkv = layer.project(layer.input_norm(hidden))  # pyright: ignore[reportCallIssue]  a ModuleList of Layer
            first = False
            hidden = layer(hidden, qkv, expanded, tables, slots, lengths, keys, values)
        return hidden

    @torch.jit.export
    def through(
        self,
        hidden: Tensor,
        injections: List[Tensor],
        tables: List[Tensor],
        slots: Tensor,
        lengths: Tensor,
        keys: List[Tensor],
        values: List[Tensor],
    ) -> Tensor:
        """The whole segment, where nothing is sent at its start. Arguments as for `forward`."""
        return self.forward(hidden, self.first.project(self.norm(hidden)), injections, tables, slots, lengths, keys, values)


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
    def tables(self, lengths: Tensor, counts: Tensor, slots: Tensor, like: Tensor) -> List[Tensor]:
        """lengths, counts, slots: int64 [B]: tokens cached, new tokens, pool slot of each row. like: dtype and device.

        Returns cos and sin (signed for a rotation by half) [B, T, 1, D]; index, slot and position of each real new token [N];
        one mask [B, 1, groups · T, L] per window, empty where a single decode token sees everything.
        """
        B = lengths.shape[0]
        T = int(counts.max())
        offsets = torch.arange(T, device=like.device)
        positions = lengths[:, None] + offsets
        angles = (positions.float()[..., None] * self.inv_freq)[:, :, None]  # pyright: ignore[reportOperatorIssue]  a buffer
        cos, sin = angles.cos() * self.scaling, angles.sin() * self.scaling
        tables = [torch.cat([cos, cos], -1).to(like.dtype), torch.cat([-sin, sin], -1).to(like.dtype)]
        real = offsets < counts[:, None]
        tables.append(real.flatten().nonzero().flatten())
        tables.append(slots[:, None].expand(B, T)[real])
        tables.append(positions[real])
        keys = torch.arange(int((lengths + counts).max()), device=like.device)
        for window in self.windows:
            if B == 1 and T == 1 and window == 0:
                tables.append(torch.empty(0, dtype=torch.bool, device=like.device))
            else:
                mask = keys <= positions[..., None]
                if window > 0:
                    mask = mask & (keys > positions[..., None] - window)
                tables.append(mask.repeat(1, self.groups, 1)[:, None])
        return tables

    def forward(
        self,
        hidden: Tensor,
        injections: List[Tensor],
        counts: Tensor,
        slots: Tensor,
        lengths: Tensor,
        keys: List[Tensor],
        values: List[Tensor],
    ) -> Tensor:
        """A whole step in one call, for a plan with one segment and no exchange: hidden [B, T, H] -> exit [B, T, H]."""
        tables = self.tables(lengths, counts, slots, hidden)
        for segment in self.segments:  # there is one
            hidden = segment.through(hidden, injections, tables, slots, lengths, keys, values)  # pyright: ignore[reportCallIssue]
        return hidden
