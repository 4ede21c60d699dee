"""DMM-Net: match proposals with templates, then refine the matched masks. Tensors in, tensors out."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmm_fast import ops  # noqa: F401  registers torch.ops.dmm.*

from . import efficientnet
from .config import Config
from .efficientnet import EfficientNetLite0
from .features import mask_means, roi_means
from .masks import cover, mask_boxes, moved, overlap, scaled, velocity
from .refinement import RIVALRY, HeavyRefinement, LightRefinement, certainty, doubled, probabilities
from .state import Affinity, Candidates, Output, Proposals, State, empty_like, merge


def make_backbone(
    name: str, pretrained: bool, levels: int = 4
) -> tuple[nn.Module, list[int], list[int], list[float], list[float]]:
    """A timm backbone and its coarsest levels (4: conv2-5; 5: the stem too): module, channels, strides, mean, std.

    pretrained: with its ImageNet weights. Without them the packaged network's backbone needs no timm.
    """
    if name == "tf_efficientnet_lite0" and not pretrained:
        own = EfficientNetLite0(levels)
        return own, own.channels, efficientnet.STRIDES[-levels:], efficientnet.MEAN, efficientnet.STD
    import timm  # slow to import

    if not timm.is_model(name):
        raise ValueError(f"DMMNet: timm has no backbone {name!r}")
    try:
        net = timm.create_model(name, pretrained=pretrained, features_only=True, out_indices=tuple(range(-levels, 0)))
    except (IndexError, AssertionError):  # what timm raises where there are fewer
        raise ValueError(f"DMMNet: backbone {name!r} has fewer than {levels} levels (refine 'heavy' takes 5)") from None
    except OSError as error:
        raise RuntimeError(
            f"DMMNet: the ImageNet weights of backbone {name!r} are not in the local cache and could not be "
            f"downloaded. Connect once, give a weights file of this project, or match on overlap alone (backbone "
            f"'none'). Cause: {error}"
        ) from error
    settings = timm.data.resolve_model_data_config(net)
    return net, net.feature_info.channels(), net.feature_info.reduction(), settings["mean"], settings["std"]


class DMMNet(nn.Module):
    """One object slot per row, one proposal per column; a step is `encode`, `compare`, `match`, `decide`.

    `step` runs the four in order. They are separate so that training can look inside, and so that another matcher can
    take the place of `match` (see `dmm_fast.Segmenter`). Frames are [3, H, W] RGB, uint8 or float in [0, 1].
    """

    strides: list[int]  # pixels per cell of each level

    def __init__(self, config: Config, pretrained: bool = False) -> None:
        super().__init__()
        self.config = config
        channels: list[int] = []
        self.strides = []
        mean, std = [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]
        self.backbone = None
        if config.backbone != "none":
            levels = 5 if config.refine == "heavy" else 4
            self.backbone, channels, self.strides, mean, std = make_backbone(config.backbone, pretrained, levels)
        self.refinement = None
        if config.refine != "none":
            light = config.refine == "light"
            self.refinement = (
                LightRefinement(channels, config.hidden, config.serial)
                if light
                else HeavyRefinement(channels, config.hidden, config.objects, config.memory)
            )
        self.channels = sum(channels[-4:])
        self.embed = nn.Linear(self.channels, config.embed, bias=False) if config.embed else nn.Identity()
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)
        self.input_size = config.input_size or (0, 0)  # 0: no limit; TorchScript cannot narrow an attribute's Optional
        self.short_side, self.enlarge = config.short_side or 0, config.enlarge
        self.iou_weight = float(config.iou_weight)  # TorchScript takes no int for a float
        self.prices = config.layer == "prices"
        self.masked = config.pool == "mask"
        self.update, self.motion = float(config.update), float(config.motion)
        self.n_grad, self.n_proj, self.lr = config.n_grad, config.n_proj, float(config.lr)
        self.carry = config.dykstra == "carry"
        self.min_iou, self.min_cosine = float(config.min_iou), float(config.min_cosine)
        self.min_certainty = float(config.min_certainty)
        self.rivalry = RIVALRY[config.objects]
        self.heavy = config.refine == "heavy"
        self.together = config.objects == "together"
        self.follow_refined = config.follow == "refined"

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width at which a frame of this size enters the backbone."""
        if self.input_size[0] > 0:
            return self.input_size
        if self.enlarge or 0 < self.short_side < min(height, width):
            scale = self.short_side / min(height, width)
            return int(height * scale + 0.5), int(width * scale + 0.5)
        return height, width

    @torch.jit.export
    def encode(self, frames: Tensor) -> list[Tensor]:
        """Features of frames [B, 3, H, W], conv2-5 (heavy: the stem too), each [B, C_l, h_l, w_l]; or no backbone, none."""
        levels: list[Tensor] = []
        if self.backbone is not None:
            image = frames.to(self.mean.dtype)
            size = self.resized(frames.size(2), frames.size(3))
            # Not asked: whether the frame has that size already. Export would then fix the answer.
            if self.input_size[0] > 0 or self.short_side > 0:
                image = F.interpolate(image, size=size, mode="bilinear", align_corners=False, antialias=True)
            if not frames.is_floating_point():
                image = image / 255.0
            levels = self.backbone((image - self.mean) / self.std)
        return levels

    def describe(self, features: list[Tensor], boxes: Tensor, cover: Tensor, height: int, width: int) -> Tensor:
        """Features [R, C] from conv2-5 of objects with boxes [R, 4], in pixels of the frame, and masks [R, h, w], on any grid."""
        if self.masked:
            return self.embed(mask_means(features[-4:], cover))
        resized = self.resized(height, width)
        boxes = scaled(boxes, resized[1] / width, resized[0] / height)
        return self.embed(roi_means(features[-4:], self.strides[-4:], boxes))

    def grid(self, features: list[Tensor], height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the cells on which masks of a frame of `height` x `width` pixels are compared.

        Those of the stem where there is a heavy refinement, which decides there; else pixels of the frame, shrunk until its short
        side is at most 240.
        """
        if self.heavy:
            return features[0].size(2), features[0].size(3)
        short = smaller(height, width)
        side = smaller(short, 240)
        return height * side // short, width * side // short

    @torch.jit.export
    def start(self, frame: Tensor, masks: Tensor, valid: Tensor) -> State:
        """The state after a frame with objects `masks` [N, H, W] bool in the slots `valid` [N]."""
        return self.begin(self.encode(frame[None]), masks, valid)

    def begin(self, features: list[Tensor], masks: Tensor, valid: Tensor) -> State:
        """`start` from the frame's features."""
        height, width = masks.size(1), masks.size(2)
        masks = masks & valid[:, None, None]
        rows, columns = self.grid(features, height, width)
        on_grid = cover(masks, rows, columns).to(self.mean.dtype)
        hidden: list[Tensor] = []
        if self.refinement is not None:
            hidden = self.refinement.start(features, on_grid)
        described = self.describe(features, mask_boxes(masks), on_grid, height, width)
        motion = on_grid.new_zeros((masks.size(0), 2))
        full = masks[:, :0, :0] if self.heavy else masks
        return State(valid, F.normalize(described, dim=1), on_grid, on_grid, motion, full, hidden)

    @torch.jit.export
    def add(self, frame: Tensor, masks: Tensor, new: Tensor, state: State) -> State:
        """The state with objects `masks` [N, H, W] in the slots `new` [N]; `frame` is that of the last step, or of `start`."""
        return merge(new, state, self.start(frame, masks, new))

    @torch.jit.export
    def drop(self, gone: Tensor, state: State) -> State:
        """The state with the slots `gone` [N] free."""
        return merge(gone, state, empty_like(state))

    @torch.jit.export
    def prepare(self, proposals: Proposals, state: State, height: int, width: int) -> Candidates:
        """Proposals for a frame of `height` x `width` pixels with their masks on the grid of `state`; none: one of padding.

        Soft masks and run-length codes go there directly: nothing of the size [M, H, W] is made.
        """
        if proposals.scores.numel() == 0:
            proposals = absent(state.masks)
        boxes, masks = proposals.boxes, proposals.masks
        rows, columns = state.masks.size(1), state.masks.size(2)
        if masks.dtype == torch.bool:
            on_grid = cover(masks, rows, columns)
        elif masks.dtype == torch.int32:
            on_grid = torch.ops.dmm.decode_runs(masks, height, width, rows, columns)
        else:
            on_grid = torch.ops.dmm.paste_masks(masks, scaled(boxes, columns / width, rows / height), rows, columns, 2)
        return Candidates(boxes, proposals.scores, masks, on_grid.to(state.masks.dtype), height, width)

    @torch.jit.export
    def compare(self, features: list[Tensor], candidates: Candidates, state: State) -> Affinity:
        """Cosine similarity with the templates and IoU with the last masks, moved on, both [N, M]."""
        described = self.describe(features, candidates.boxes, candidates.cover, candidates.height, candidates.width)  # [M, C]
        described = F.normalize(described, dim=1)
        cosine = state.features @ described.t()
        masks = state.masks if self.motion == 0.0 else moved(state.masks, state.motion)
        return Affinity(cosine, overlap(masks, candidates.cover), described)

    def similarity(self, affinity: Affinity) -> Tensor:
        """(1 - lambda) cos + lambda IoU, [N, M]."""
        return torch.lerp(affinity.cosine, affinity.iou, self.iou_weight)

    @torch.jit.export
    def cost(self, affinity: Affinity) -> Tensor:
        """Eq. 1: C = (lambda - 1) cos - lambda IoU, [N, M]."""
        return -self.similarity(affinity)

    @torch.jit.export
    def match(self, cost: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
        """The matching layer on the valid rows and real proposals of cost [N, M].

        With fewer proposals than objects the problem is infeasible, so empty proposals (cost 0) are appended first;
        for static shapes there are always N of them, counted only where needed. Returns X [N, M + N], where the last
        N columns are those.
        """
        real = scores > float("-inf")  # [M]
        n, m = valid.sum(), real.sum()
        empty = cost.new_zeros((cost.size(0), cost.size(1) + cost.size(0)))
        padded = torch.cat([torch.where(real, cost, empty[:, : cost.size(1)]), empty[:, cost.size(1) :]], 1)  # [N, M + N]
        order = torch.argsort(valid.to(torch.uint8), descending=True, stable=True)  # valid rows first
        problem, rows, columns = padded[order][None], n[None], torch.maximum(m, n)[None]
        if self.prices:
            x = torch.ops.dmm.match_prices(problem, rows, columns, None, self.n_grad, self.n_proj, self.lr)
        else:
            x = torch.ops.dmm.match(problem, None, rows, columns, None, self.n_grad, self.n_proj, self.lr, self.carry)
        return x[0][torch.argsort(order)]

    @torch.jit.export
    def decide(
        self, features: list[Tensor], candidates: Candidates, affinity: Affinity, assignment: Tensor, state: State
    ) -> tuple[Output, State]:
        """From an assignment X [N, >= M] (columns beyond M: empty proposals) to masks and the next state.

        X * 1[X = row max] (Section 4.1) leaves a row's largest entry; among equal ones (duplicate proposals) the
        cheapest, then the first, is kept, so that masks are never blended. Its weight is divided by its own detached
        value: a mask in Eq. 8 then has value 1, not 0.4, inside, and the gradient of X still passes.
        """
        size = candidates.scores.numel()
        real = candidates.scores > float("-inf")  # [M]
        similarity = self.similarity(affinity)  # [N, M]
        padded = similarity
        if assignment.size(1) > size:
            padded = F.pad(similarity, [0, assignment.size(1) - size])
        largest = assignment == assignment.amax(1, keepdim=True)
        never = similarity.new_full((1,), float("-inf"))
        choice = torch.where(largest, padded, never).argmax(1, keepdim=True)  # [N, 1]
        weight = assignment.gather(1, choice)  # [N, 1]
        column = choice.clamp(max=size - 1)
        believed = ((affinity.iou > self.min_iou) | (affinity.cosine > self.min_cosine)) & real  # [N, M]
        found = believed.gather(1, column) & (choice < size) & (weight > 0)
        found = found[:, 0] & state.valid  # [N]

        scale = weight / weight.detach().clamp(min=1e-12)  # [N, 1], 1 where found
        if self.heavy:
            matched, on_grid, found = self.pick(candidates, column, scale, found, state.masks)
            full = state.full
        else:
            matched, full, found = self.paste(candidates, column, scale, found, state.full)
            on_grid = state.masks
        # Where masks overlap, a lost object's stale mask lies below, and a smaller mask lies on a larger one: a
        # proposal that spans two objects then leaves the smaller one visible.
        area = matched.flatten(1).sum(1)  # [N]
        rank = torch.argsort(torch.argsort(torch.where(found, area, float("inf")), descending=True, stable=True))
        proposal = torch.where(found, column[:, 0], -1)
        chosen = torch.arange(size, device=proposal.device) == proposal[:, None]  # [N, M]
        if self.refinement is not None:
            kept = scale * chosen  # [N, M]
            logits, parts, hidden = self.refinement(features, candidates, affinity, kept, matched, state)
            logits = torch.where(state.valid[:, None, None], logits, -100.0)  # nowhere, but finite: it is interpolated
            if self.follow_refined:
                if self.heavy:
                    on_grid = settled(logits, self.together)
                else:
                    full = logits > 0.0
            decided = logits
            if self.min_certainty > 0.0:
                unseen = certainty(probabilities(logits, state.valid, self.rivalry)) < self.min_certainty
                decided = logits.masked_fill(unseen[:, None, None], -100.0)
        else:
            logits, parts, hidden = torch.logit(matched, 1e-6), affinity.iou.new_zeros((matched.size(0), 0)), state.hidden
            decided = full.to(logits.dtype) - 0.5  # so that rank decides where soft masks overlap
        if not self.heavy:
            on_grid = cover(full, on_grid.size(1), on_grid.size(2)).to(on_grid.dtype)
        labels = torch.ops.dmm.upsample_argmax(decided.detach(), rank, candidates.height, candidates.width)

        score = similarity.gather(1, column)[:, 0] * found
        rivals = torch.where(real & ~chosen, similarity, never).amax(1)
        runner_up = torch.nan_to_num(rivals, neginf=0.0) * state.valid
        output = Output(logits, matched, labels, proposal, score, runner_up, state.valid ^ found, parts)
        templates = self.renewed(state.features, affinity, column, found)
        motion = state.motion
        if self.motion > 0.0:
            motion = velocity(state.masks, on_grid, motion, self.motion)
        return output, State(state.valid, templates, state.templates, on_grid, motion, full, hidden)

    def renewed(self, features: Tensor, affinity: Affinity, column: Tensor, found: Tensor) -> Tensor:
        """Unit features of the templates [N, C] after the proposals `column` [N, 1] were matched where `found` [N]."""
        if self.update == 0.0:
            return features
        sure = found & (affinity.iou.gather(1, column)[:, 0] > 0.5)
        seen = affinity.features.index_select(0, column[:, 0])
        newer = F.normalize(torch.lerp(features, seen, self.update), dim=1)
        return torch.where(sure[:, None], newer, features)

    def pick(
        self, candidates: Candidates, column: Tensor, scale: Tensor, found: Tensor, last: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Eq. 8 on the grid with one proposal, `column` [N, 1], left per row: P^ [N, h, w], the same without `scale` [N, 1], and
        what is `found` [N].

        An empty mask is no match. Where nothing is found, the mask is the last one.
        """
        picked = candidates.cover.index_select(0, column[:, 0])
        found = found & (picked.flatten(1).amax(1) > 0)  # [N]
        where = found[:, None, None]
        return torch.where(where, picked * scale[:, :, None], last), torch.where(where, picked, last), found

    def paste(
        self, candidates: Candidates, column: Tensor, scale: Tensor, found: Tensor, last: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `pick`, at the frame's size: P^ [N, H, W], P^ > 0.5, and what is `found` [N]."""
        masks, height, width = candidates.masks, candidates.height, candidates.width
        if masks.is_floating_point():
            kept = torch.zeros((column.size(0), candidates.scores.size(0)), dtype=scale.dtype, device=scale.device)
            kept = kept.scatter(1, column, scale)  # [N, M]
            pasted = torch.ops.dmm.paste_combine(kept, masks, candidates.boxes, height, width)
            found = found & (pasted.flatten(1).amax(1) > 0.5)
            matched = torch.where(found[:, None, None], pasted, last.to(pasted.dtype))
            return matched, matched > 0.5, found
        picked = masks.index_select(0, column[:, 0])
        if masks.dtype == torch.int32:
            picked = torch.ops.dmm.decode_runs(picked, height, width, height, width) > 0.5
        found = found & (picked.flatten(1).to(torch.uint8).amax(1) > 0)  # [N]
        row = torch.arange(found.size(0), device=found.device)
        # Not where(found, picked, last): ONNX Runtime has none for bool.
        full = torch.cat([picked, last]).index_select(0, torch.where(found, row, row + row.size(0)))
        return full.to(scale.dtype) * torch.where(found, scale[:, 0], 1.0)[:, None, None], full, found

    @torch.jit.export
    def step(self, frame: Tensor, proposals: Proposals, state: State) -> tuple[Output, State]:
        """One frame. With M = 0 proposals every object is lost."""
        return self.follow(self.encode(frame[None]), proposals, state, frame.size(1), frame.size(2))

    def follow(
        self, features: list[Tensor], proposals: Proposals, state: State, height: int, width: int
    ) -> tuple[Output, State]:
        """`step` from the features of a frame of `height` x `width` pixels."""
        candidates = self.prepare(proposals, state, height, width)
        affinity = self.compare(features, candidates, state)
        assignment = self.match(self.cost(affinity), candidates.scores, state.valid)
        return self.decide(features, candidates, affinity, assignment, state)

    def forward(self, frame: Tensor, proposals: Proposals, state: State) -> tuple[Output, State]:
        """The same as `step`."""
        return self.step(frame, proposals, state)


def smaller(a: int, b: int) -> int:
    """The smaller of two sizes, also where an export leaves them open."""
    if not torch.jit.is_scripting():
        return torch.sym_min(a, b)
    return min(a, b)


def settled(logits: Tensor, together: bool) -> Tensor:
    """Logits [N, h, w] as masks on the same grid: of each cell, how many of its four quarters are above 0, and with objects together
    higher than any other's."""
    quarters = doubled(logits)
    inside = quarters >= quarters.amax(0, keepdim=True).clamp(min=1e-30) if together else quarters > 0.0
    return F.avg_pool2d(inside.to(logits.dtype), 2)


def absent(masks: Tensor) -> Proposals:
    """One padding proposal on the device of `masks`: stands for no proposal at all."""
    boxes = torch.zeros((1, 4), dtype=torch.float32, device=masks.device)
    scores = torch.full((1,), float("-inf"), dtype=torch.float32, device=masks.device)
    return Proposals(boxes, scores, torch.zeros((1, 1, 1), dtype=torch.float32, device=masks.device))
