"""Refinement of matched masks: `start(features, masks)` -> hidden state, `forward(..)` -> logits, parts, hidden state."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .state import Affinity, Candidates, State


class ConvLSTM(nn.Module):
    """One ConvLSTM layer over N objects of one image.

    Its input is the image's features, the same for all objects, beside maps of each object. A convolution over stacked
    maps is the sum of convolutions over the parts, so the image's part is computed once however many objects there are.
    serial: it also sees the hidden state of another object, the one before.
    """

    def __init__(self, shared: int, own: int, hidden: int, serial: bool = False) -> None:
        super().__init__()
        self.shared = nn.Conv2d(shared, 4 * hidden, 3, padding=1)
        self.own = nn.Conv2d(own + hidden * (2 if serial else 1), 4 * hidden, 3, padding=1, bias=False)

    def forward(self, shared: Tensor, own: list[Tensor], c: Tensor) -> tuple[Tensor, Tensor]:
        """shared [1, C, y, x]; own: maps and hidden states of the objects, [N, ., y, x] each; cell state c [N, D, y, x]
        -> the next h and c.
        """
        gates = self.shared(shared) + self.own(torch.cat(own, 1))  # [N, 4D, y, x]
        i, f, o, g = gates.chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


class LightRefinement(nn.Module):
    """Section 3's light refinement: four ConvLSTM layers from conv5 to conv2, with memory from frame to frame.

    Each layer sees its level's features, the coarser layer's output, and the matched and template masks. The result is
    added to the matched mask as a change of its logit: the last convolution starts at zero, so that an untrained
    refinement returns the matched mask, and fine detail of a proposal survives the coarse grid of conv2.

    serial: as in the authors' code, each layer also sees the hidden state of the object before, in the same frame. Objects
    are then refined one after the other, and depend on their order.
    """

    def __init__(self, channels: list[int], hidden: int, serial: bool = False) -> None:
        super().__init__()
        widths = [hidden, hidden // 2, hidden // 4, hidden // 8]  # conv5 .. conv2
        self.widths = widths
        self.serial = serial
        squeezes: list[nn.Module] = []
        layers: list[nn.Module] = []
        above = 0  # beside it, a layer sees two masks: matched and template
        for level, width in zip(reversed(channels), widths):
            squeezes.append(nn.Sequential(nn.Conv2d(level, width, 1), nn.GroupNorm(1, width)))
            layers.append(ConvLSTM(width, above + 2, width, serial))
            above = width
        self.squeezes, self.layers = nn.ModuleList(squeezes), nn.ModuleList(layers)
        self.head = nn.Conv2d(above, 1, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.gain = nn.Parameter(torch.tensor(4.0))  # logit of a matched pixel

    def start(self, features: list[Tensor], masks: Tensor) -> list[Tensor]:
        """Zero state: h and c of each layer, coarse to fine, each [N, D, h_l, w_l]."""
        hidden: list[Tensor] = []
        for k, width in enumerate(self.widths):
            level = features[len(features) - 1 - k]
            zeros = level.new_zeros((masks.size(0), width, level.size(2), level.size(3)))
            hidden.append(zeros)
            hidden.append(zeros)
        return hidden

    def forward(
        self,
        features: list[Tensor],
        candidates: Candidates,
        affinity: Affinity,
        kept: Tensor,
        matched: Tensor,
        state: State,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """features: each [1, C_l, h_l, w_l], fine to coarse; matched [N, H, W] float -> logits [N, H, W]; no parts."""
        masks = [matched[:, None], state.templates.to(matched.dtype)[:, None]]  # [N, 1, H, W], [N, 1, h, w]
        levels: list[Tensor] = []
        for k, squeeze in enumerate(self.squeezes):
            levels.append(squeeze(features[len(features) - 1 - k]))
        before: list[Tensor] = []
        if self.serial:
            rows: list[list[Tensor]] = []
            for h in state.hidden[::2]:
                before.append(torch.zeros_like(h[:1]))
            for n in range(matched.size(0)):
                row = self.run(levels, [mask[n : n + 1] for mask in masks], [h[n : n + 1] for h in state.hidden], before)
                before = [torch.where(state.valid[n], h, b) for h, b in zip(row[::2], before)]
                rows.append(row)
            following = [torch.cat([row[k] for row in rows]) for k in range(2 * len(levels))]
        else:
            following = self.run(levels, masks, state.hidden, before)
        finest = following[len(following) - 2]
        change = F.interpolate(self.head(finest), size=matched.shape[1:], mode="bilinear", align_corners=False)[:, 0]
        return change + self.gain * (2.0 * matched - 1.0), affinity.iou.new_zeros((matched.size(0), 0)), following

    def run(self, levels: list[Tensor], masks: list[Tensor], hidden: list[Tensor], before: list[Tensor]) -> list[Tensor]:
        """The next h and c of each layer, coarse to fine; masks of any size, [N, 1, ., .] each; before: h of the object before, if serial."""
        above: list[Tensor] = []
        following: list[Tensor] = []
        for k, layer in enumerate(self.layers):
            size = [levels[k].size(2), levels[k].size(3)]
            own = [F.adaptive_avg_pool2d(mask, size) for mask in masks]
            for h in above:
                own.append(F.interpolate(h, size=size, mode="bilinear", align_corners=False))
            own.append(hidden[2 * k])
            if len(before) > 0:
                own.append(before[k])
            h, c = layer(levels[k], own, hidden[2 * k + 1])
            above = [h]
            following.append(h)
            following.append(c)
        return following


class Residual(nn.Module):
    """Two 3 x 3 convolutions around which the input is carried."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(F.relu(x))))


class GlobalConvolution(nn.Module):
    """RGMP's global convolution block: a large kernel as the sum of two separable halves, then a residual block."""

    def __init__(self, width: int, size: int = 7) -> None:
        super().__init__()
        tall, wide = (size, 1), (1, size)
        down, across = (size // 2, 0), (0, size // 2)
        self.left = nn.Sequential(nn.Conv2d(width, width, tall, padding=down), nn.Conv2d(width, width, wide, padding=across))
        self.right = nn.Sequential(nn.Conv2d(width, width, wide, padding=across), nn.Conv2d(width, width, tall, padding=down))
        self.residual = Residual(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.residual(self.left(x) + self.right(x))


class Memory(nn.Module):
    """Where a frame looks like an object, and where like the rest, in a frame whose masks are known.

    Keys are unit vectors, so the similarity exp(t (cos - 1)) needs no maximum taken out first, and one product with
    (mask, 1 - mask) sums it over the object and over the rest. Both -t and a preference for nearby cells,
    -|p - q|^2 / 2 s^2 = pq / s^2 - p^2 / 2 s^2 - q^2 / 2 s^2, are dot products themselves and are laid into the keys.
    """

    def __init__(self, near: bool, frames: int = 0) -> None:
        super().__init__()
        self.frames = frames  # further ones, in `recent`
        self.sharpness = nn.Parameter(torch.tensor(2.5))  # log t
        self.reach = nn.Parameter(torch.tensor(1.6))  # log s, in cells; without use where not near
        self.near = near

    def forward(self, query: Tensor, keys: Tensor, masks: Tensor, valid: Tensor, recent: list[Tensor]) -> Tensor:
        """query [1, K, h, w], keys [N, K, h, w] (near: [1, K, h, w], the same for all), masks [N, 1, h, w] -> [N, 2, h w]: what
        speaks for the object and for the rest; anything in slots that are not `valid` [N].

        recent: keys and masks [N, K + 1, frames h', w'] of further frames, one above the other, each of which counts as much.
        """
        height, width = query.size(2), query.size(3)
        t = self.sharpness.exp()
        if self.near:
            place = places(height, width, query) / self.reach.exp()  # [1, 2, h, w]
            square, one = -0.5 * place.square().sum(1, keepdim=True), torch.ones_like(place[:, :1])
            query = torch.cat([t * query, place, square - t, one], 1)
            keys = torch.cat([keys] + [part.expand(keys.size(0), -1, -1, -1) for part in [place, one, square]], 1)
        else:
            query, keys = t * with_another(query, -1.0), with_another(keys, 1.0)
        query, known, value = query[0].flatten(1) * 1.4426950408889634, by_cell(keys), both(masks)  # log2 e: `recall` takes 2^x
        # Objects that were given in one frame, as most are, have the same keys. Which have is asked where that costs little:
        # a GPU would have to wait for the answer, and could not capture the step as a graph.
        if self.near:
            total = recall(query, known[0], value)
        elif keys.is_cpu:
            total = recall_by_frame(query, known, value, valid)
        else:
            total = recall_each(query, known, value)
        for memory in recent:
            keys, masks = memory[:, :-1], memory[:, -1:]
            more = recall_each(query, by_cell(with_another(keys, 1.0)), both(masks))
            cells = float(height * width * self.frames) / float(keys.size(2) * keys.size(3))
            total = (total + cells * more) / (1.0 + self.frames)
        return total


def places(height: int, width: int, like: Tensor) -> Tensor:
    """Rows and columns of cells, [1, 2, height, width], from the middle."""
    y = torch.linspace(-(height - 1) / 2.0, (height - 1) / 2.0, height, dtype=like.dtype, device=like.device)
    x = torch.linspace(-(width - 1) / 2.0, (width - 1) / 2.0, width, dtype=like.dtype, device=like.device)
    return torch.stack([y[:, None].expand(height, width), x.expand(height, width)])[None]


def with_another(keys: Tensor, value: float) -> Tensor:
    """Keys [N, K, h, w] and a channel that is `value` everywhere."""
    return F.pad(keys, [0, 0, 0, 0, 0, 1], value=value)


def by_cell(keys: Tensor) -> Tensor:
    """Keys [N, K, h, w] as [N, h w, K]."""
    return keys.flatten(2).transpose(1, 2)


def evidence(total: Tensor) -> Tensor:
    """Log-odds, evidence for, against [N, m, 3, ...] from what m memories say, [N, m, 2, ...]."""
    log = torch.log(total + 1e-4)
    return torch.cat([log[:, :, :1] - log[:, :, 1:], log], 2) * 0.2  # about the size of a mask's values


def probabilities(logits: Tensor, valid: Tensor, rivalry: float) -> Tensor:
    """Probabilities of `valid` objects [N] from their logits against none [N, ...], o_i / (1 + o_i + rivalry * sum of the other o_j) with the
    odds o = exp(logit): each by itself (0), divided among the objects and none (1), or in between."""
    if rivalry == 0.0:
        return torch.sigmoid(logits)
    if rivalry == 1.0:
        return among(logits, valid)
    odds = logits.clamp(-80.0, 40.0).flatten(1).exp() * valid[:, None]
    return (odds / (1.0 + torch.lerp(odds, odds.sum(0, keepdim=True), rivalry))).view(logits.shape)


def certainty(inside: Tensor) -> Tensor:
    """The mean probability of each object [N] in its own mask, sum p^2 / sum p over probabilities p [N, h, w]; low where there is next to none."""
    return inside.square().flatten(1).sum(1) / inside.flatten(1).sum(1).clamp(min=1.0)


def both(masks: Tensor) -> Tensor:
    """The object and the rest of masks [N, 1, h, w]: [N, 2, h w]."""
    return torch.cat([masks, 1.0 - masks], 1).flatten(2)


def recall(query: Tensor, known: Tensor, value: Tensor, at_once: int = 1 << 20) -> Tensor:
    """Sums of `value` [N, V, cells], weighted by 2^(k q) of each cell's k in `known` [cells, K], the same for all N, and each q in
    `query` [K, Q]: [N, V, Q]. (Not e^(k q), which on a CPU takes up to 30 times as long where the result is below 1e-38.)

    A CPU takes them in parts of so many similarities `at_once`, 4 MB, where there are many more: all of a frame of 400 pixels are
    80 MB, and take twice as long.
    """
    part = query.size(1)
    exported = False
    if not torch.jit.is_scripting():
        exported = torch.compiler.is_compiling()  # which would fix the number of parts
    if query.is_cpu and not exported:
        if known.size(0) * query.size(1) > 4 * at_once:
            part = max(at_once // known.size(0) // 64, 1) * 64
    values = value.flatten(0, 1)
    sums = [torch.mm(values, torch.mm(known, some).exp2_()) for some in query.split(part, 1)]
    total = sums[0] if len(sums) == 1 else torch.cat(sums, 1)
    return total.view(value.size(0), value.size(1), query.size(1))


def recall_each(query: Tensor, known: Tensor, value: Tensor) -> Tensor:
    """`recall` where each object has its own frame: `known` [N, cells, K]."""
    similarity = torch.bmm(known, query.expand(known.size(0), -1, -1)).exp2_()  # [N, cells, Q]
    return torch.bmm(value, similarity)


def recall_by_frame(query: Tensor, known: Tensor, value: Tensor, valid: Tensor) -> Tensor:
    """`recall`, which compares with every frame in `known` once, however many of the `valid` objects have it; 0 for others."""
    total = value.new_zeros((value.size(0), value.size(1), query.size(1)))
    done = (~valid).to(torch.uint8)
    if not torch.jit.is_scripting():
        if torch.compiler.is_compiling():
            return _recall_in_a_loop(query, known, value, total, done)
    while bool((done == 0).any()):
        total, done = recall_next(query, known, value, total, done)
    return total


def recall_next(query: Tensor, known: Tensor, value: Tensor, total: Tensor, done: Tensor) -> tuple[Tensor, Tensor]:
    """`total` [N, V, Q] and `done` [N] with the objects of one frame more."""
    slot = first(done == 0)
    frame = known.index_select(0, slot)
    alike = (known == frame).flatten(1).all(1) | (torch.arange(done.size(0), device=done.device) == slot)
    return torch.where(alike[:, None, None], recall(query, frame[0], value), total), torch.maximum(done, alike.to(done.dtype))


def _recall_in_a_loop(query: Tensor, known: Tensor, value: Tensor, total: Tensor, done: Tensor) -> Tensor:
    """The loop as an op, for torch.export and torch.compile."""
    from torch._higher_order_ops import while_loop

    def left(total: Tensor, done: Tensor) -> Tensor:
        return (done == 0).any()

    def following(total: Tensor, done: Tensor) -> tuple[Tensor, Tensor]:
        return recall_next(query, known, value, total, done)

    return while_loop(left, following, (total, done))[0]


# Of objects that share: divided pixels (1) make small objects vanish, pixels apart (0) let alike ones change places.
RIVALRY = {"apart": 0.0, "sharing": 0.3, "together": 1.0}


class HeavyRefinement(nn.Module):
    """A U-Net in RGMP's style, from five levels of features (stem, conv2-5) and what is known of each object.

    Siamese: the frame is compared, cell by cell, with the object's template frame and with the last frame (`Memory`),
    on keys from the same layers. Parts: a matched mask is one proposal, but an object may be several (a rider and a
    horse), so a small network judges for every proposal how much of it belongs to the object, and the decoder sees the
    proposals painted with this share, and with the rest of it. The image's part of each convolution is computed once
    however many objects there are.

    objects: "sharing" divides a proposal's shares among the objects and none (`among`), and both the judge and the decoder also see what
    speaks for the object's strongest rival: its cosine, what it was assigned, its parts, its template's evidence; of a pixel, rivals count
    by `RIVALRY`. "together" divides pixels as well. With one object both are the same as "apart".

    memory: so many further frames of each object are compared as its template is, at half the size (`remember`).
    """

    def __init__(self, channels: list[int], hidden: int, objects: str = "apart", memory: int = 0) -> None:
        super().__init__()
        self.sharing = objects != "apart"
        self.rivalry = RIVALRY[objects]
        self.memory = memory
        self.key_fine, self.key_coarse = nn.Conv2d(channels[2], hidden, 1), nn.Conv2d(channels[3], hidden, 1)
        self.template, self.last = Memory(near=False, frames=memory), Memory(near=True)
        rivals = int(self.sharing)
        self.judge = nn.Sequential(nn.Linear(8 + 3 * rivals, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
        maps, cues = 5, 6  # painted masks; what the two memories say
        images: list[nn.Module] = []
        owns: list[nn.Module] = []
        ups: list[nn.Module] = []
        blocks: list[nn.Module] = []
        coarser = channels[4]
        for level, width in zip((3, 2, 1, 0), (hidden, hidden * 3 // 4, hidden // 2, hidden // 4)):
            images.append(nn.Conv2d(channels[level], width, 1))
            owns.append(nn.Conv2d(maps + rivals + (cues + rivals if level else 0), width, 3, padding=1))
            ups.append(nn.Conv2d(coarser, width, 1))
            blocks.append(GlobalConvolution(width) if level == 3 else Residual(width))
            coarser = width
        self.images, self.owns = nn.ModuleList(images), nn.ModuleList(owns)
        self.ups, self.blocks = nn.ModuleList(ups), nn.ModuleList(blocks)
        self.head = nn.Conv2d(coarser, 1, 3, padding=1)

    def keys(self, features: list[Tensor]) -> Tensor:
        """Unit keys of a frame at conv3's size, [1, K, h, w]."""
        fine = features[2]
        coarse = F.interpolate(self.key_coarse(features[3]), size=fine.shape[2:], mode="bilinear", align_corners=False)
        return F.normalize(self.key_fine(fine) + coarse, dim=1)

    def start(self, features: list[Tensor], masks: Tensor) -> list[Tensor]:
        """Keys and mask of the template, then of the last frame: [N, K, h, w], [N, 1, h, w], twice. With a memory, those of its
        frames too, [N, K + 1, memory h', w'], and how many frames were seen well, [N, 1, 1, 1]."""
        keys = self.keys(features)
        keys = keys.expand(masks.size(0), keys.size(1), keys.size(2), keys.size(3))
        mask = F.adaptive_avg_pool2d(masks[:, None], [keys.size(2), keys.size(3)])
        hidden = [keys, mask, keys, mask]
        if self.memory > 0:
            hidden.append(halved(keys, mask).repeat(1, 1, self.memory, 1))
            hidden.append(mask.new_zeros((mask.size(0), 1, 1, 1)))
        return hidden

    def forward(
        self,
        features: list[Tensor],
        candidates: Candidates,
        affinity: Affinity,
        kept: Tensor,
        matched: Tensor,
        state: State,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """features: each [1, C_l, h_l, w_l], fine to coarse; kept [N, M]: 1 where a proposal is assigned; candidates and matched
        [N, h_1, w_1] on the grid, the stem's cells -> logits [N, h_1, w_1], parts [N, M]."""
        keys = self.keys(features)
        # Templates come from any frame, but the last frame is the same for all: the keys of one slot in use are everyone's.
        last_keys = state.hidden[2].index_select(0, first(state.valid))  # [1, K, h3, w3]
        remembered = [
            self.template(keys, state.hidden[0], state.hidden[1], state.valid, state.hidden[4:5]),
            self.last(keys, last_keys, state.hidden[3], state.valid, []),
        ]
        cues = evidence(torch.stack(remembered, 1)).flatten(1, 2)  # [N, 6, h3 w3]
        cues = cues.view(cues.size(0), 6, keys.size(2), keys.size(3))
        like = torch.sigmoid(5.0 * cues[:, ::3])  # [N, 2, h3, w3]
        last = state.masks * state.valid[:, None, None]  # [N, h1, w1]
        pairs = [affinity.cosine, affinity.iou]
        if self.sharing:
            others, kept_beside, cosine_beside, like_beside = beside([last, kept, affinity.cosine, like[:, :1]], state.valid)
            pairs += [kept, kept_beside, cosine_beside]
            given = torch.cat([cues, like_beside], 1)
        else:
            others, given = beside([last], state.valid)[0], cues
        seen = F.adaptive_avg_pool2d(torch.stack([last, others], 1), [keys.size(2), keys.size(3)])
        logits = self.parts(candidates.cover, pairs, torch.cat([seen, like, cues[:, 1::3]], 1))  # [N, M]
        share = probabilities(logits, state.valid, float(self.sharing))
        inside = (share[:, :, None, None] * candidates.cover).amax(1)
        outside = ((1.0 - share)[:, :, None, None] * candidates.cover).amax(1)
        maps = [matched, last, others, inside, outside]
        if self.sharing:
            maps += beside([inside], state.valid)
        logits = self.decode(features, torch.stack(maps, 1), given)[:, 0]
        inside = probabilities(doubled(logits), state.valid, self.rivalry)
        mask = F.adaptive_avg_pool2d(inside[:, None], [keys.size(2), keys.size(3)])
        keys = keys.expand(matched.size(0), keys.size(1), keys.size(2), keys.size(3))
        hidden = [state.hidden[0], state.hidden[1], keys, mask]
        if self.memory > 0:
            hidden += self.remember(halved(keys, mask), certainty(inside) > 0.9, state.hidden[4], state.hidden[5])
        return logits, share, hidden

    def remember(self, newest: Tensor, sure: Tensor, memory: Tensor, count: Tensor) -> list[Tensor]:
        """The memory and its count after a frame [N, K + 1, h', w'] in which the objects `sure` [N] were seen well.

        Every 4th such frame is kept; every 16th, the oldest of those moves one place further; and so on. So the places hold views
        from a moment ago to long ago, and what is hidden keeps its own.
        """
        rows = newest.size(2)
        count = count + sure[:, None, None, None].to(count.dtype)
        frames: list[Tensor] = []
        for k in range(self.memory):
            old = memory[:, :, k * rows : (k + 1) * rows]
            due = sure[:, None, None, None] & (torch.remainder(count, float(4 << (2 * k))) == 0)
            frames.append(torch.where(due, newest, old))
            newest = old
        return [torch.cat(frames, 2), count]

    def parts(self, cover: Tensor, pairs: list[Tensor], seen: Tensor) -> Tensor:
        """How much of each proposal belongs to each object, from maps of which it covers a part, `seen` [N, 6, h, w], and what is
        known of each pair [N, M]: logits [N, M]."""
        coarse = F.adaptive_avg_pool2d(cover[:, None], [seen.size(2), seen.size(3)])[:, 0].flatten(1)  # [M, h w]
        area = coarse.sum(1).clamp(min=1e-3)
        mean = torch.matmul(seen.flatten(2), coarse.t()) / area  # [N, 6, M]
        known = torch.cat([mean.transpose(1, 2)] + [pair[:, :, None] for pair in pairs], 2)  # [N, M, 8 or 11]
        return self.judge(known)[:, :, 0]

    def decode(self, features: list[Tensor], maps: Tensor, cues: Tensor) -> Tensor:
        """Coarse to fine; the logit of the mask at the stem's size, [N, 1, h1, w1]."""
        dtype = self.head.weight.dtype
        maps, cues = maps.to(dtype), cues.to(dtype)
        x = features[4].to(dtype)
        for k, (image, own, up, block) in enumerate(zip(self.images, self.owns, self.ups, self.blocks)):
            level = features[3 - k].to(dtype)
            size = [level.size(2), level.size(3)]
            known = maps
            if k < 3:
                known = F.adaptive_avg_pool2d(maps, size)
                coarse = F.interpolate(cues, size=size, mode="bilinear", align_corners=False)
                known = torch.cat([known[:, :5], coarse, known[:, 5:]], 1)
            above = F.interpolate(up(x), size=size, mode="bilinear", align_corners=False)
            x = F.relu(block(own(known) + (image(level) + above)))
        return self.head(x).to(features[4].dtype)

    @torch.jit.unused
    def in_precision(self, dtype: torch.dtype) -> nn.Module:
        """The same with a copy of the decoder in `dtype`."""
        twin = copy.copy(self)
        decoder = {name: copy.deepcopy(self._modules[name]).to(dtype) for name in ("images", "owns", "ups", "blocks", "head")}
        twin._modules = {**self._modules, **decoder}
        return twin


def doubled(logits: Tensor) -> Tensor:
    """Logits [N, h, w] of the stem at the size of the network's input, [N, 2 h, 2 w]."""
    size = [2 * logits.size(1), 2 * logits.size(2)]
    return F.interpolate(logits[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def halved(keys: Tensor, masks: Tensor) -> Tensor:
    """Unit keys [N, K, h, w] and masks [N, 1, h, w] at half the size, rounded up: [N, K + 1, h', w']."""
    size = [(keys.size(2) + 1) // 2, (keys.size(3) + 1) // 2]
    keys = F.normalize(F.adaptive_avg_pool2d(keys, size), dim=1)
    return torch.cat([keys, F.adaptive_avg_pool2d(masks, size)], 1)


def first(flags: Tensor) -> Tensor:
    """Index [1] of the first of `flags` [N] that is set; the last index where none is."""
    place = torch.arange(flags.size(0), device=flags.device)
    # Not by argmax: AOTInductor's gives no index from N = 16 on.
    return torch.where(flags, place, flags.size(0) - 1).amin(0, keepdim=True)


def among(logits: Tensor, valid: Tensor) -> Tensor:
    """Probabilities of `valid` objects [N] from their logits against none [N, ...]: they and that of none add up to 1."""
    flat = torch.where(valid[:, None], logits.flatten(1), -60.0)
    return F.softmax(F.pad(flat, [0, 0, 0, 1]), 0)[:-1].view(logits.shape)


def beside(values: list[Tensor], valid: Tensor) -> list[Tensor]:
    """For each of the objects, in `values` of any kinds [N, ...], the highest value of any other `valid` one [N]; at least 0, also
    where there is none."""
    rows = [value.flatten(1) for value in values]
    flat = torch.cat(rows, 1) * valid[:, None]
    # A row of zeros stands for "none": asking how many objects there are would fix the answer in an export.
    top, index = F.pad(flat, [0, 0, 0, 1]).topk(2, dim=0)
    own = torch.arange(flat.size(0), device=flat.device)[:, None] == index[0]
    others = torch.where(own, top[1], top[0]).split([row.size(1) for row in rows], 1)
    return [other.reshape(value.shape) for other, value in zip(others, values)]
