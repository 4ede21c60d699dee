"""The matching layer in plain PyTorch: the yardstick that the fused kernels are tested and timed against.

Everything here favours being obviously right over being fast. ``match`` is Algorithm 1 of the paper and its two published
relatives; ``listing1`` is the paper's Listing 1 to the letter; ``greedy``, ``linear_assignment`` and ``sinkhorn`` are the peers
people compare with. All take a cost ``[N, M]`` or ``[B, N, M]`` (N templates, M proposals) and return an assignment of the
same shape.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

DYKSTRA = ("reset", "carry", "released")
OUTPUT = ("average", "last")


def project_rows(x: Tensor) -> Tensor:
    """Project onto {X : X 1 = 1} (Eq. 5). ``x`` is ``[..., N, M]``."""
    return x - (x.sum(-1, keepdim=True) - 1) / x.shape[-1]


def project_rows_at_most(x: Tensor) -> Tensor:
    """Project onto {X : X 1 <= 1}. ``x`` is ``[..., N, M]``."""
    row_sum = x.sum(-1, keepdim=True)  # [..., N, 1]
    return torch.where(row_sum <= 1, x, x - (row_sum - 1) / x.shape[-1])


def project_columns(x: Tensor) -> Tensor:
    """Project onto {X : X^T 1 <= 1} (Eq. 6). ``x`` is ``[..., N, M]``."""
    column_sum = x.sum(-2, keepdim=True)  # [..., 1, M]
    return torch.where(column_sum <= 1, x, x - (column_sum - 1) / x.shape[-2])


def project_sign(x: Tensor) -> Tensor:
    """Project onto {X : X >= 0} (Eq. 7)."""
    return x.relu()


def _order(dykstra: str, rows) -> tuple:
    """The projections of a round, in order."""
    return (project_sign, project_columns, rows) if dykstra == "released" else (rows, project_columns, project_sign)


def _dykstra(x: Tensor, corrections: list[Tensor], projections, n_proj: int) -> Tensor:
    """``n_proj`` rounds of Dykstra's cyclic projections; updates ``corrections`` in place (the list, not its tensors)."""
    for _ in range(n_proj):
        for i, project in enumerate(projections):
            x = x + corrections[i]
            y = project(x)
            corrections[i] = x - y
            x = y
    return x


def released_init(cost: Tensor) -> Tensor:
    """The released code's start: each row takes its cheapest among the columns in which it is the cheapest row."""
    wins = torch.zeros_like(cost, dtype=torch.bool).scatter_(-2, cost.argmin(-2, keepdim=True), True)  # [..., N, M]
    choice = torch.where(wins, cost, cost.amax((-2, -1), keepdim=True)).argmin(-1, keepdim=True)  # [..., N, 1]
    return torch.zeros_like(cost).scatter_(-1, choice, 1.0)


def _match_dense(
    cost: Tensor, init: Tensor, n_grad: int, n_proj: int, lr, dykstra: str, output: str, rows=project_rows
) -> Tensor:
    """One batch of equal sizes, ``[..., N, M]``. rows: the projection onto what row sums may be."""
    x = init
    order = _order(dykstra, rows)
    zeros = [torch.zeros_like(cost)] * 3
    corrections = list(zeros)
    iterates = [] if dykstra == "reset" else [init]
    previous = None
    for _ in range(n_grad):
        x = x - lr * cost
        if dykstra == "released":
            iterates.append(x)
            x = _dykstra(x, corrections, order, n_proj)
            reached = (iterates[-1] * cost).norm()
            if previous is not None and reached == previous:
                break
            previous = reached
            continue
        x = _dykstra(x, list(zeros) if dykstra == "reset" else corrections, order, n_proj)
        iterates.append(x)
    return x if output == "last" else torch.stack(iterates).mean(0)


def match(
    cost: Tensor,
    init: Tensor | None = None,
    *,
    n_grad: int = 40,
    n_proj: int = 5,
    lr: float | Tensor = 0.1,
    dykstra: str = "reset",
    output: str = "average",
    num_templates: Tensor | None = None,
    num_proposals: Tensor | None = None,
    unmatched_cost: float | Tensor | None = None,
) -> Tensor:
    """Projected gradient with Dykstra's projections, differentiable by plain autograd.

    ``dykstra="reset"`` is Algorithm 1 (the corrections start at 0 in every outer step), ``"carry"`` is Listing 1 (they are
    carried, and the start counts in the average), ``"released"`` the authors' released code (ReLU first, averages the points
    *before* projection, greedy start, stops when the cost repeats; for weights trained with it).
    With ``unmatched_cost`` c, a number, ``[N]`` or ``[B, N]``, row sums are at most 1, and the cost is C - c.
    Ragged batches: problem ``b`` is ``cost[b, :num_templates[b], :num_proposals[b]]``; the rest of its result is 0.
    A problem with a non-finite cost, start, lr or unmatched_cost is NaN throughout and leaves the others alone.
    Half precision is computed in float32.
    """
    if dykstra not in DYKSTRA or output not in OUTPUT:
        raise ValueError(f"match: dykstra must be one of {DYKSTRA} and output one of {OUTPUT}, got {dykstra!r}, {output!r}")
    start = None
    if init is not None:
        start = (init if init.dim() == 3 else init[None]).to(accumulate_dtype(cost))  # [B, N, M]
    rows = project_rows if unmatched_cost is None else project_rows_at_most

    def solve(b: int, c: Tensor, step) -> Tensor:
        if start is not None:
            x0 = start[b, : c.shape[0], : c.shape[1]]
        else:
            x0 = released_init(c) if dykstra == "released" else torch.zeros_like(c)
        x = _match_dense(c, x0, n_grad, n_proj, step, dykstra, output, rows)
        return x + 0 * (c.sum() + x0.sum() + step)  # NaN anywhere in the problem if anything in it is not finite

    return _stack_problems("match", cost, lr, num_templates, num_proposals, unmatched_cost, solve)


def accumulate_dtype(cost: Tensor) -> torch.dtype:
    """The dtype of sums of costs, and of numbers per template or problem."""
    return torch.float64 if cost.dtype == torch.float64 else torch.float32


def unmatched_costs(name: str, cost: Tensor, unmatched_cost: float | Tensor | None) -> Tensor | None:
    """``unmatched_cost`` as a tensor: a number, also one in a tensor ``[]``, becomes one per template."""
    if unmatched_cost is None:
        return None
    size = cost.shape[-2:-1]  # [N]; a cost of the wrong shape is refused later
    if isinstance(unmatched_cost, Tensor):
        return unmatched_cost if unmatched_cost.dim() else unmatched_cost.expand(size)
    if not -math.inf < unmatched_cost < math.inf:  # which torch.compile can trace, unlike math.isfinite
        raise ValueError(f"{name}: unmatched_cost must be finite, got {unmatched_cost:g}")
    return torch.full(size, unmatched_cost, dtype=accumulate_dtype(cost), device=cost.device)


def _counts(name: str, which: str, given: Tensor | None, B: int, most: int) -> list[int]:
    """What each problem of a ragged batch has of its templates or proposals; refused in the ops' words."""
    if given is None:
        return [most] * B
    if given.shape != (B,):
        raise RuntimeError(f"{name}: {which} must have shape [{B}], got {list(given.shape)}")
    counts = given.tolist()
    for b, count in enumerate(counts):
        if not 0 <= count <= most:
            raise RuntimeError(f"{name}: {which} must be in [0, {most}], got {count} at {b}")
    return counts


def _stack_problems(
    name: str, cost: Tensor, lr, num_templates: Tensor | None, num_proposals: Tensor | None,
    unmatched_cost: float | Tensor | None, solve,
) -> Tensor:  # fmt: skip
    """``solve(b, cost [n, m] less what staying alone costs, lr) -> X [n, m]`` for every problem b of a possibly ragged batch; 0
    elsewhere, differentiable. Half precision is solved in float32."""
    if not isinstance(lr, Tensor) and not 0 < lr < math.inf:
        raise ValueError(f"lr must be positive and finite, got {lr:g}")
    batched = (cost if cost.dim() == 3 else cost[None]).to(accumulate_dtype(cost))  # [B, N, M]
    B, N, M = batched.shape
    own = _alone(name, batched, unmatched_cost)
    steps = lr.expand(B) if isinstance(lr, Tensor) else [lr] * B
    rows, columns = _counts(name, "num_templates", num_templates, B, N), _counts(name, "num_proposals", num_proposals, B, M)
    results = []
    for b in range(B):
        c = batched[b, : rows[b], : columns[b]]
        if own is not None:
            c = c - own[b, : rows[b], None]
        if c.numel() == 0:
            results.append(torch.zeros_like(batched[b]) + c.sum())  # 0, still attached to the graph
        else:
            x = solve(b, c, steps[b])
            results.append(F.pad(x, (0, M - columns[b], 0, N - rows[b])))
    x = torch.stack(results) if B else batched.clone()
    return x.reshape(cost.shape).to(torch.result_type(cost, 1.0))  # whole numbers become fractions


def match_prices(
    cost: Tensor,
    *,
    n_grad: int = 40,
    n_proj: int = 1,
    lr: float | Tensor = 10.0,
    output: str = "last",
    num_templates: Tensor | None = None,
    num_proposals: Tensor | None = None,
    unmatched_cost: float | Tensor | None = None,
) -> Tensor:
    """Newton prices (docs/variants.md): x_k = t_k relu(-C - a - b), one Newton step per round for the row prices a and the
    column prices b >= 0, while the sharpness t_k = n_grad lr (k / n_grad)^3 grows. Differentiable by plain autograd.

    Ragged batches as in ``match``. With ``unmatched_cost`` c row prices are at least 0, and the cost is C - c. A problem with a non-finite cost, or an lr that is not positive and finite, is NaN
    throughout and leaves the others alone.
    """
    if output not in OUTPUT:
        raise ValueError(f"match_prices: output must be one of {OUTPUT}, got {output!r}")

    def solve(b: int, c: Tensor, step) -> Tensor:
        total = torch.zeros_like(c)
        row_price = c.neg().amax(-1, keepdim=True).detach() - n_grad**2 / step  # [n, 1]; the first step forgets it
        if unmatched_cost is not None:
            row_price = row_price.relu()
        column_price = torch.zeros_like(c[:1])  # [1, m]
        for k in range(1, n_grad + 1):
            t = n_grad * step * (k / n_grad) ** 3
            for _ in range(n_proj):
                p = (-c - row_price - column_price).relu()
                pos = (p > 0).to(c.dtype)
                d = (p.sum(-1, keepdim=True) - 1 / t) / pos.sum(-1, keepdim=True).clamp(min=1)
                if unmatched_cost is not None:
                    d = torch.where(row_price + d > 0, d, -row_price)
                s = (p - pos * d).sum(-2, keepdim=True)  # column sums after the row step
                w = column_price + (s - 1 / t) / pos.sum(-2, keepdim=True).clamp(min=1)
                row_price, column_price = row_price + d, w.relu()
            if output == "average" or k == n_grad:
                total = total + t * (-c - row_price - column_price).relu()
        poison = 0 * (c.sum() + step) if step > 0 else torch.nan
        return (total if output == "last" else total / n_grad) + poison

    return _stack_problems("match_prices", cost, lr, num_templates, num_proposals, unmatched_cost, solve)


def match_batched(cost: Tensor, *, n_grad: int = 40, n_proj: int = 5, lr: float = 0.1) -> Tensor:
    """Algorithm 1 on a batch of equal sizes ``[B, N, M]``, one PyTorch call per step for the whole batch (a benchmark peer)."""
    return _match_dense(cost, torch.zeros_like(cost), n_grad, n_proj, lr, "reset", "average")


def listing1(cost: Tensor, init: Tensor, n_grad: int, n_proj: int, lr: float) -> Tensor:
    """Listing 1 of the paper, literally: one problem ``[N, M]``, matrix products against ones, every iterate kept."""

    def project_row(x: Tensor) -> Tensor:
        row_sum = x.sum(dim=1, keepdim=True)  # [N, 1]
        ones = torch.ones(1, x.shape[1]).to(x)  # [1, M]
        return x - (row_sum - 1).mm(ones) / x.shape[1]

    def project_column(x: Tensor) -> Tensor:
        column_sum = x.sum(dim=0, keepdim=True)  # [1, M]
        ones = torch.ones(x.shape[0], 1).to(x)  # [N, 1]
        mask = (column_sum <= 1).to(x)
        projected = x - ones.mm(column_sum - 1) / x.shape[0]
        return x * mask + (1 - mask) * projected

    x = init
    corrections = [torch.zeros_like(cost) for _ in range(3)]
    iterates = [init]
    for _ in range(n_grad):
        x = x - lr * cost
        for _ in range(n_proj):
            for i, project in enumerate((project_row, project_column, torch.relu)):
                x = x + corrections[i]
                y = project(x)
                corrections[i] = x - y
                x = y
        iterates.append(x)
    return torch.stack(iterates).mean(dim=0)


def check_tensor(name: str, given: object) -> None:
    """Refuse a list or an array with a message of its own; shapes and dtypes are checked later."""
    if not isinstance(given, Tensor):
        raise TypeError(f"{name}: takes a tensor [N, M] or [B, N, M], got {type(given).__name__}; torch.as_tensor makes one")


def check_counts(name: str, num_templates: object, num_proposals: object = None, size: str = "[B]") -> None:
    """Refuse a list or a number where each problem's count is due; shapes, dtypes and ranges are checked later."""
    if num_templates is None and num_proposals is None:
        return
    for which, given in (("num_templates", num_templates), ("num_proposals", num_proposals)):
        if given is not None and not isinstance(given, Tensor):
            kind = type(given).__name__
            raise TypeError(f"{name}: {which} takes an int64 tensor {size}, got {kind}; torch.as_tensor makes one")


def _batched(name: str, cost: Tensor) -> Tensor:
    """The cost as [B, N, M]."""
    check_tensor(name, cost)
    if cost.dim() not in (2, 3):
        raise ValueError(f"{name}: must have shape [B, N, M] or [N, M], got {list(cost.shape)}")
    return cost if cost.dim() == 3 else cost[None]


def _alone(name: str, cost: Tensor, unmatched_cost: float | Tensor | None) -> Tensor | None:
    """What staying alone costs each template of a batch [B, N, M]: [B, N], or None. In the dtype of the cost, to compute with."""
    own = unmatched_costs(name, cost, unmatched_cost)
    if own is None:
        return None
    B, N, _ = cost.shape
    if own.shape not in ((N,), (B, N)):
        raise ValueError(f"{name}: unmatched_cost must have shape [{N}] or [{B}, {N}], got {list(own.shape)}")
    return own.to(cost.dtype).expand(B, N)


def _valid(name: str, cost: Tensor, num_templates: Tensor | None, num_proposals: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What of a batch [B, N, M] is not padding, and the problems with a count out of range, all of which counts as theirs: bool,
    both broadcast against the batch. Without a host read."""
    valid = torch.ones((1, 1, 1), dtype=torch.bool, device=cost.device)
    wrong = torch.zeros_like(valid)
    for which, sizes, dim in (("num_templates", num_templates, 1), ("num_proposals", num_proposals, 2)):
        if sizes is not None:
            if sizes.shape != cost.shape[:1]:
                raise RuntimeError(f"{name}: {which} must have shape [{cost.shape[0]}], got {list(sizes.shape)}")
            size, shape = cost.shape[dim], [1, -1, 1] if dim == 1 else [1, 1, -1]
            counts = sizes[:, None, None]  # [B, 1, 1]
            valid = valid & (torch.arange(size, device=cost.device).view(shape) < counts)
            wrong = wrong | (counts < 0) | (counts > size)
    return valid | wrong, wrong


def greedy(
    cost: Tensor,
    *,
    num_templates: Tensor | None = None,
    num_proposals: Tensor | None = None,
    unmatched_cost: float | Tensor | None = None,
) -> Tensor:
    """Greedy one-to-one assignment: the cheapest free (template, proposal) pair first; among equal ones the first. 0/1, no
    gradient. A problem with a non-finite cost, or a count out of range, is NaN throughout. Runs on the device of ``cost``,
    without a host read.

    With ``unmatched_cost`` c, a number, ``[N]`` or ``[B, N]``, the pair first that saves most against c, and none that costs more.
    """
    batched = _batched("greedy", cost).detach()  # [B, N, M]
    check_counts("greedy", num_templates, num_proposals)
    own = _alone("greedy", batched, unmatched_cost)
    if own is not None:
        batched = batched - own.detach()[..., None]
    B, N, M = batched.shape
    if batched.numel() == 0:
        return torch.zeros_like(batched).reshape(cost.shape)
    valid, wrong = _valid("greedy", batched, num_templates, num_proposals)
    free = batched.masked_fill(~valid if own is None else ~valid | (batched > 0), torch.inf)  # [B, N, M]
    poison = (batched.masked_fill(~valid, 0) * 0).sum((1, 2), keepdim=True).masked_fill(wrong, torch.nan)  # [B, 1, 1], 0 or NaN
    problem = torch.arange(B, device=cost.device)
    found = []
    for _ in range(min(N, M)):
        least, place = free.flatten(1).min(1)  # [B]; inf, at a used place, where nothing is free
        found.append((place, least < torch.inf))
        row = place // M
        free[problem, row] = torch.inf
        free[problem, :, place - row * M] = torch.inf
    places, taken = (torch.stack(part, 1) for part in zip(*found))  # [B, min(N, M)]
    x = torch.where(valid, poison, 0).expand_as(batched).flatten(1).scatter_add(1, places, taken.to(cost.dtype))
    return x.reshape(cost.shape)


def linear_assignment(
    cost: Tensor,
    *,
    unmatched_cost: float | Tensor | None = None,
    num_templates: Tensor | None = None,
    num_proposals: Tensor | None = None,
) -> Tensor:
    """The choice ``[..., N]`` of ``dmm_fast.linear_assignment`` by scipy, one problem after the other, on the host. Staying alone
    is a column of each template's own: at its cost plus a trifle, so that matches win ties of costs which are coarser than that,
    or at a cost that outweighs everything where matches come first."""
    from scipy.optimize import linear_sum_assignment

    batched = _batched("linear_assignment", cost)
    B, N, M = batched.shape
    rows = _counts("linear_assignment", "num_templates", num_templates, B, N)
    columns = _counts("linear_assignment", "num_proposals", num_proposals, B, M)
    choice = np.full((B, N), -1)
    for b, c in enumerate(batched.detach().double().cpu().numpy()):
        c = c[: rows[b], : columns[b]]
        allowed = np.isfinite(c)
        span = 1 + 2 * np.abs(c, where=allowed, out=np.zeros_like(c)).sum()
        if unmatched_cost is None:
            own = np.full(rows[b], span)
        else:
            own = torch.as_tensor(unmatched_cost, dtype=torch.float64).cpu().expand(B, N)[b, : rows[b]].numpy() + 1e-12 * span
        alone = np.full((rows[b], rows[b]), np.inf)
        np.fill_diagonal(alone, own)
        row, column = linear_sum_assignment(np.concatenate([np.where(allowed, c, np.inf), alone], 1))
        choice[b, row] = np.where(column < columns[b], column, -1)
    return torch.from_numpy(choice).to(cost.device).reshape(cost.shape[:-1])


def sinkhorn(
    cost: Tensor,
    *,
    rounds: int = 50,
    temperature: float = 0.05,
    num_templates: Tensor | None = None,
    num_proposals: Tensor | None = None,
    unmatched_cost: float | Tensor | None = None,
) -> Tensor:
    """Entropic optimal transport with row sums 1 and column sums <= 1, in the log domain; differentiable, batched.

    Each round scales rows to 1, then scales down the columns that exceed 1. ``unmatched_cost``, a number, ``[N]`` or ``[B, N]``,
    is the cost of one more column, which takes any number of rows and is left out of the result. A problem with a count out of
    range is NaN throughout.
    """
    batched = _batched("sinkhorn", cost)  # [B, N, M]
    check_counts("sinkhorn", num_templates, num_proposals)
    valid, wrong = _valid("sinkhorn", batched, num_templates, num_proposals)
    present, _ = _valid("sinkhorn", batched, num_templates)
    floor = torch.finfo(cost.dtype).min / 4
    log_k = torch.where(valid, -batched / temperature, floor)  # [B, N, M]
    v = torch.zeros_like(log_k[:, :1])  # [B, 1, M]
    own = _alone("sinkhorn", batched, unmatched_cost)
    if own is not None:
        alone = torch.where(present, -own[..., None] / temperature, floor)  # [B, N, 1]
    for _ in range(rounds):
        scaled = log_k + v if own is None else torch.cat([log_k + v, alone], -1)
        u = torch.where(present, -torch.logsumexp(scaled, -1, keepdim=True), 0)  # [B, N, 1]; padding takes nothing
        v = (-torch.logsumexp(log_k + u, -2, keepdim=True)).clamp(max=0)  # [B, 1, M]
    return torch.where(valid, torch.exp(log_k + u + v), 0).masked_fill(wrong, torch.nan).reshape(cost.shape)


def mask_confident(assignment: Tensor) -> Tensor:
    """Keep each template's most confident proposal: X * 1[X = row max] (Section 4.1). Differentiable through what is kept."""
    check_tensor("mask_confident", assignment)
    if assignment.shape[-1] == 0:
        return assignment
    return assignment * (assignment == assignment.amax(-1, keepdim=True))


def feasibility(assignment: Tensor, *, num_templates: Tensor | None = None, unmatched: bool = False) -> dict[str, Tensor]:
    """How far X is from the constraints of Eq. 3, per problem, ``[]`` or ``[B]``: ``rows`` max |row sum - 1| over the templates
    there are (``unmatched``: max(row sum - 1, 0), as templates may stay alone), ``columns`` max(column sum - 1, 0), ``sign``
    max(-X, 0). At 40 x 5 rows are off by up to 0.7; 400 x 50 brings them to 1e-3.
    """
    check_tensor("feasibility", assignment)
    check_counts("feasibility", num_templates)
    rows = assignment.sum(-1) - 1  # [B, N]
    rows = rows.clamp(min=0) if unmatched else rows.abs()
    if num_templates is not None:
        counts = num_templates.reshape(*rows.shape[:-1], 1)  # [B, 1], or [1] for a single problem
        rows = rows.where(torch.arange(rows.shape[-1], device=rows.device) < counts, 0)
    columns = (assignment.sum(-2) - 1).clamp(min=0)  # [B, M]
    signs = (-assignment).clamp(min=0).flatten(-2)  # [B, N * M]
    return {name: F.pad(value, (0, 1)).amax(-1) for name, value in (("rows", rows), ("columns", columns), ("sign", signs))}


# ---- the steps around the layer (dmm_fast.ops.vision) ----------------------------------------------------------------------


def mask_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of every pair of masks, bool: ``a [..., N, H, W], b [..., M, H, W] -> [..., N, M]`` float32; 0 if both are empty."""
    a, b = a.flatten(-2).double(), b.flatten(-2).double()  # [..., N, HW], [..., M, HW]
    both = a @ b.mT  # [..., N, M]
    either = a.sum(-1)[..., :, None] + b.sum(-1)[..., None, :] - both
    return torch.where(either > 0, both / either.clamp(min=1), 0).float()


def paste_weights(low: Tensor, high: Tensor, samples: int, size: int) -> Tensor:
    """Bilinear weights ``[M, size, samples]`` that stretch ``samples`` mask cells over ``[low, high)``, both ``[M]`` in pixels.

    A box without a positive, finite extent gets no weight anywhere.
    """
    extent = high - low
    valid = (extent > 0) & extent.isfinite()
    pixels = torch.arange(size, dtype=low.dtype, device=low.device) + 0.5
    low, extent = torch.where(valid, low, 0), torch.where(valid, extent, 1)
    at = (pixels - low[:, None]) / extent[:, None] * samples - 0.5  # [M, size]
    cells = torch.arange(samples, dtype=low.dtype, device=low.device)
    tent = (1 - (at[:, :, None] - cells).abs()).clamp(min=0)  # [M, size, samples]
    return tent * valid[:, None, None]


def paste(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks ``[M, S, S]`` stretched into their boxes ``[M, 4]``: ``[M, H, W]``, each Ay M Ax^T.

    Equal to detectron2's continuous paste (``grid_sample(..., align_corners=False)``, before its threshold).
    """
    x0, y0, x1, y1 = boxes.unbind(-1)
    ay = paste_weights(y0, y1, masks.shape[-1], size[0]).to(masks.dtype)  # [M, H, S]
    ax = paste_weights(x0, x1, masks.shape[-1], size[1]).to(masks.dtype)  # [M, W, S]
    return ay @ masks @ ax.mT


def paste_combine(assignment: Tensor, masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Eq. 8: ``out_i = sum_j X_ij paste(mask_j, box_j)``, ``[N, M], [M, S, S], [M, 4] -> [N, H, W]``."""
    return torch.einsum("nm,mhw->nhw", assignment, paste(masks, boxes, size))


def paste_masks(masks: Tensor, boxes: Tensor, rows: int, columns: int, samples: int) -> Tensor:
    """How much of each cell a pasted mask covers, ``[M, S, S], [M, 4] -> [M, rows, columns]``: the share of ``samples`` x
    ``samples`` points of the cell, evenly spaced, at which it is above 0.5."""
    above = paste(masks, boxes * samples, (rows * samples, columns * samples)) > 0.5
    return above.view(masks.shape[0], rows, samples, columns, samples).to(masks.dtype).mean((2, 4))


def decode_runs(runs: Tensor, height: int, width: int, rows: int, columns: int) -> Tensor:
    """How much of each cell the mask of a run-length code covers, exactly: ``[M, R] -> [M, rows, columns]`` float32.

    With F(p) the number of mask pixels before position p of a column-major frame, linear within a pixel, a cell has
    F(x height + y1) - F(x height + y0) of pixel column x.
    """
    total = height * width
    places = F.pad(runs, (0, runs.shape[1] % 2), value=total).clamp(0, total).double()  # [M, 2K]
    begins, lengths = places[:, ::2].contiguous(), (places[:, 1::2] - places[:, ::2])  # [M, K]
    before = F.pad(lengths.cumsum(1), (1, 0))  # [M, K + 1]
    edges = torch.arange(rows + 1, dtype=torch.float64, device=runs.device) * height / rows
    at = torch.arange(width, dtype=torch.float64, device=runs.device)[:, None] * height + edges  # [W, rows + 1]
    at = at.flatten().expand(runs.shape[0], -1).contiguous()  # [M, W (rows + 1)]
    begins, lengths = F.pad(begins, (1, 0), value=-1.0), F.pad(lengths, (1, 0))  # the 0th run is empty
    run = torch.searchsorted(begins, at) - 1  # the last one that begins before
    inside = torch.minimum(at - begins.gather(1, run), lengths.gather(1, run)) + before.gather(1, (run - 1).clamp(min=0))
    inside = inside.view(-1, width, rows + 1).diff(dim=2)  # [M, W, rows]
    edges = torch.arange(columns + 1, dtype=torch.float64, device=runs.device) * width / columns
    pixels = torch.arange(width, dtype=torch.float64, device=runs.device)[:, None]
    shared = (torch.minimum(edges[1:], pixels + 1) - torch.maximum(edges[:-1], pixels)).clamp(min=0)  # [W, columns]
    return (inside.mT @ shared * (rows * columns / total)).float()


def upsample_argmax(logits: Tensor, rank: Tensor, height: int, width: int) -> Tensor:
    """One label per pixel from ``logits [N, h, w]`` enlarged bilinearly to ``[N, height, width]``: ``[height, width]`` uint8, 0
    where none is above 0, else 1 + the index of the highest; between equal ones, of that with the highest ``rank [N]``."""
    if logits.shape[0] == 0:
        return torch.zeros((height, width), dtype=torch.uint8, device=logits.device)
    full = F.interpolate(logits[None], size=(height, width), mode="bilinear", align_corners=False)[0]
    order = rank.argsort(descending=True)
    highest, place = full[order].max(0)  # the first of equal ones
    return torch.where(highest > 0, order[place] + 1, 0).to(torch.uint8)


def bias_clamp(x: Tensor, bias: Tensor, residual: Tensor | None, low: float, high: float) -> Tensor:
    """``x [N or 1, C, H, W]`` with ``bias [C]`` and a residual, ``[N or 1, C, H, W]``, added, in [low, high]."""
    y = x + bias[:, None, None]
    return (y if residual is None else y + residual).clamp(low, high)
