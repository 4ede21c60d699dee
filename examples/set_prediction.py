"""DETR's matcher without the trip to the host: the whole batch is decided by one call, on the device, with ragged targets.

    python examples/set_prediction.py

compares with scipy, times both, and trains a tiny set predictor on synthetic boxes. To use it in your model, copy `HungarianMatcher`
and `generalized_iou`; it takes and returns what the matcher of DETR does.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import dmm_fast

Targets = list[dict[str, Tensor]]  # per image: labels [T] int64 and boxes [T, 4], centre x, centre y, width, height in [0, 1]
Pairs = list[tuple[Tensor, Tensor]]  # per image: indices of queries, ascending, and of the targets they are matched with


class HungarianMatcher(nn.Module):
    """One query for each target, at the least cost of class, L1 and generalized IoU together."""

    def __init__(self, cost_class: float = 1.0, cost_bbox: float = 5.0, cost_giou: float = 2.0):
        super().__init__()
        self.cost_class, self.cost_bbox, self.cost_giou = cost_class, cost_bbox, cost_giou

    @torch.no_grad()
    def forward(self, logits: Tensor, boxes: Tensor, targets: Targets) -> Pairs:
        """logits [B, Q, C], boxes [B, Q, 4] -> pairs of query and target, on the device; min(Q, T) of them for each image."""
        queries, counts = logits.size(1), [len(target["labels"]) for target in targets]
        on_device = torch.tensor(counts).to(logits.device, non_blocking=True)  # shapes are known here: nothing has to come back
        choice = dmm_fast.linear_assignment(self.cost(logits, boxes, targets), num_templates=on_device)  # [B, T]
        # With more targets than queries some targets have none (-1). They sort to the end, as padding does, and are cut off.
        query, target = choice.where(choice >= 0, queries).sort(dim=1)
        return [(q[: min(queries, count)], t[: min(queries, count)]) for q, t, count in zip(query, target, counts)]

    def cost(self, logits: Tensor, boxes: Tensor, targets: Targets) -> Tensor:
        """[B, T, Q], T the largest number of targets; `linear_assignment` looks at no padding."""
        labels = pad_sequence([target["labels"] for target in targets], batch_first=True)  # [B, T]
        wanted = pad_sequence([target["boxes"] for target in targets], batch_first=True)  # [B, T, 4]
        probability = logits.float().softmax(2).transpose(1, 2)  # [B, C, Q]
        cost = -self.cost_class * probability.gather(1, labels[..., None].expand(-1, -1, logits.size(1)))
        cost = cost + self.cost_bbox * torch.cdist(wanted, boxes.float(), p=1)
        cost = cost - self.cost_giou * generalized_iou(wanted[:, :, None], boxes.float()[:, None])
        # A prediction that is NaN would be a forbidden pair. So there is a pair for every target even in a step that has to be skipped.
        return cost.nan_to_num(nan=1e6)


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """Of boxes (centre, size) in the last dimension; the others broadcast."""
    a_low, a_high = a[..., :2] - a[..., 2:] / 2, a[..., :2] + a[..., 2:] / 2
    b_low, b_high = b[..., :2] - b[..., 2:] / 2, b[..., :2] + b[..., 2:] / 2
    common = (torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low)).clamp(min=0).prod(-1)
    hull = (torch.maximum(a_high, b_high) - torch.minimum(a_low, b_low)).prod(-1).clamp(min=1e-9)
    union = (a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - common).clamp(min=1e-9)
    return common / union - (hull - union) / hull


@torch.no_grad()
def loop_over_scipy(matcher: HungarianMatcher, logits: Tensor, boxes: Tensor, targets: Targets) -> Pairs:
    """The usual way: the costs of every query with the targets of all images, a copy to the host, scipy image by image."""
    probability = logits.flatten(0, 1).softmax(1)
    labels, wanted = torch.cat([t["labels"] for t in targets]), torch.cat([t["boxes"] for t in targets])
    cost = -matcher.cost_class * probability[:, labels]
    cost = cost + matcher.cost_bbox * torch.cdist(boxes.flatten(0, 1), wanted, p=1)
    cost = cost - matcher.cost_giou * generalized_iou(boxes.flatten(0, 1)[:, None], wanted[None])
    parts = cost.view(*logits.shape[:2], -1).cpu().split([len(target["labels"]) for target in targets], 2)
    found = [linear_sum_assignment(part[image]) for image, part in enumerate(parts)]
    return [(torch.as_tensor(query), torch.as_tensor(target)) for query, target in found]


# --------------------------------------------------------------------------------- is it the same, and how long does it take?


def random_batch(batch: int = 16, queries: int = 300, most: int = 60, classes: int = 91, device="cpu"):
    logits = torch.randn(batch, queries, classes + 1, device=device)
    boxes = torch.rand(batch, queries, 4, device=device) * 0.5 + 0.1
    targets = []
    for count in torch.randint(0, most + 1, (batch,)).tolist():
        labels = torch.randint(classes, (count,), device=device)
        targets.append({"labels": labels, "boxes": torch.rand(count, 4, device=device) * 0.5 + 0.1})
    return logits, boxes, targets


def milliseconds(function, repeats: int = 15) -> float:
    """The median, after two calls to warm up."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return sorted(times[2:])[repeats // 2]


def compare(device: str, batch: int = 16, queries: int = 300, most: int = 60) -> None:
    matcher, data = HungarianMatcher(), random_batch(batch, queries, most, device=device)
    ours, theirs = matcher(*data), loop_over_scipy(matcher, *data)
    same = sum(torch.equal(q.cpu(), a) and torch.equal(t.cpu(), b) for (q, t), (a, b) in zip(ours, theirs))
    print(f"{batch} images, {queries} queries, 0 to {most} targets, {device}: the same pairs as scipy in {same} of {batch}")
    cost, counts = matcher.cost(*data), torch.tensor([len(t["labels"]) for t in data[2]], device=device)
    host = [part[:count].numpy() for part, count in zip(cost.cpu(), counts.tolist())]
    print(f"  matcher, costs included: {milliseconds(lambda: matcher(*data)):.2f} ms", end="")
    print(f", the loop over scipy {milliseconds(lambda: loop_over_scipy(matcher, *data)):.2f} ms")
    decide = milliseconds(lambda: dmm_fast.linear_assignment(cost, num_templates=counts))
    print(f"  the decision alone: {decide:.2f} ms, scipy {milliseconds(lambda: [*map(linear_sum_assignment, host)]):.2f} ms")


# ----------------------------------------------------------------------------------------------------------------- a toy


class Predictor(nn.Module):
    """Each of 8 x 8 cells of a picture is a query: a class (the last: nothing) and a box with its centre in or beside the cell."""

    def __init__(self, classes: int = 3, width: int = 48):
        super().__init__()
        layers: list[nn.Module] = []
        for before, stride in ((3, 2), (width, 2), (width, 1), (width, 1), (width, 1)):
            layers += [nn.Conv2d(before, width, 3, stride, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        self.body, self.head = nn.Sequential(*layers), nn.Conv2d(width, classes + 1 + 4, 1)
        middle = (torch.arange(8) + 0.5) / 8
        grid = torch.stack([middle.repeat(8), middle.repeat_interleave(8)], 1)  # [64, 2] x y
        self.register_buffer("middle", grid)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        out = self.head(self.body(pictures)).flatten(2).transpose(1, 2)  # [B, 64, C + 4]
        centre = self.middle + 0.07 * out[..., -4:-2].tanh()
        return out[..., :-4], torch.cat([centre, (out[..., -2:] - 1).sigmoid()], 2)


def draw(batch: int, device: str, most: int = 5) -> tuple[Tensor, Targets]:
    """Pictures [B, 3, 32, 32] of up to `most` red, green or blue boxes, the later ones on top, in noise."""
    pictures, targets = 0.2 * torch.randn(batch, 3, 32, 32), []
    for picture, count in zip(pictures, torch.randint(0, most + 1, (batch,)).tolist()):
        size, labels = torch.randint(5, 14, (count, 2)), torch.randint(3, (count,))
        low = (torch.rand(count, 2) * (33 - size)).long()
        for (x, y), (wide, tall), label in zip(low.tolist(), size.tolist(), labels.tolist()):
            picture[:, y : y + tall, x : x + wide] = F.one_hot(torch.tensor(label), 3)[:, None, None] * torch.rand(()).add(0.5)
        boxes = torch.cat([low + size / 2, size], 1) / 32
        targets.append({"labels": labels.to(device), "boxes": boxes.to(device)})
    return pictures.to(device), targets


def set_loss(logits: Tensor, boxes: Tensor, targets: Targets, pairs: Pairs) -> Tensor:
    """DETR's: classes of all queries, boxes of the matched ones."""
    image = torch.cat([torch.full_like(query, b) for b, (query, _) in enumerate(pairs)])
    query = torch.cat([query for query, _ in pairs])
    labels = torch.cat([target["labels"][t] for target, (_, t) in zip(targets, pairs)])
    wanted = torch.cat([target["boxes"][t] for target, (_, t) in zip(targets, pairs)])
    classes = torch.full(logits.shape[:2], logits.size(2) - 1, device=logits.device)
    classes[image, query] = labels
    weight = torch.ones(logits.size(2), device=logits.device)
    weight[-1] = 0.3  # most queries are nothing
    near = boxes[image, query]
    apart = 5 * (near - wanted).abs().sum() + 2 * (1 - generalized_iou(near, wanted)).sum()
    return F.cross_entropy(logits.transpose(1, 2), classes, weight) + apart / max(len(query), 1)


@torch.no_grad()
def f1(logits: Tensor, boxes: Tensor, targets: Targets) -> float:
    """Of predictions that are something: right where class and box (generalized IoU > 0.5) are a target's, each target once."""
    right, said, there = 0, 0, sum(len(target["labels"]) for target in targets)
    for label, box, target in zip(logits.argmax(2), boxes, targets):
        something = label < logits.size(2) - 1
        fits = generalized_iou(target["boxes"][:, None], box[something]) > 0.5
        fits &= target["labels"][:, None] == label[something]
        cost = torch.zeros(fits.shape).masked_fill(~fits.cpu(), torch.inf)  # infinite: forbidden
        right += int((dmm_fast.linear_assignment(cost) >= 0).sum())
        said += int(something.sum())
    return 2 * right / max(said + there, 1)


def train(steps: int = 400, batch: int = 32, device: str = "cpu") -> tuple[list[float], float]:
    """The loss of each step, and F1 on pictures that were not trained on."""
    net, matcher = Predictor().to(device), HungarianMatcher()
    optimizer = torch.optim.AdamW(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
    losses = []
    for step in range(steps):
        pictures, targets = draw(batch, device)
        logits, boxes = net(pictures)
        loss = set_loss(logits, boxes, targets, matcher(logits, boxes, targets))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
        if step % 100 == 0 or step == steps - 1:
            print(f"  step {step:3}: loss {loss:.3f}")
    pictures, targets = draw(256, device)
    return torch.stack(losses).tolist(), f1(*net.eval()(pictures), targets)


if __name__ == "__main__":
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    compare(device)
    print("training a set predictor on boxes in noise")
    losses, score = train(device=device)
    print(f"  loss {sum(losses[:20]) / 20:.2f} -> {sum(losses[-20:]) / 20:.2f}, F1 of held-out pictures {score:.3f}")
