"""`dmm::match` and `dmm::match_prices` as ONNX functions: standard ops and Loop, so that every runtime can run them.

A runtime with a kernel of its own for these nodes uses that instead; another inlines the body. Both take a batch of ragged
problems, `cost` [B, N, M] float32 or float64, and how much of each is real, `num_templates` and `num_proposals` [B] int64.
Rounds are those of docs/matching.md and docs/variants.md, for all problems at once.

`match_unmatched` and `match_prices_unmatched` are for templates that may stay alone, at `unmatched_cost` [N] or [B, N]. A call
without keeps its function, which is the quicker one.
"""

from onnxscript import script, values
from onnxscript.onnx_opset import opset18 as op

dmm = values.Opset("dmm", 1)


@script(dmm, default_opset=op)
def match(
    cost, num_templates, num_proposals,
    n_grad: int = 40, n_proj: int = 5, lr: float = 0.1, carry: int = 0, last: int = 0,
):  # fmt: skip
    rows = op.Less(op.Range(0, op.Squeeze(op.Shape(cost, start=1, end=2)), 1), op.Unsqueeze(num_templates, [1]))  # [B, N]
    columns = op.Less(op.Range(0, op.Squeeze(op.Shape(cost, start=2, end=3)), 1), op.Unsqueeze(num_proposals, [1]))
    rows, columns = op.Unsqueeze(rows, [2]), op.Unsqueeze(columns, [1])  # [B, N, 1], [B, 1, M]
    inside = op.And(rows, columns)  # [B, N, M]
    one = op.CastLike(1.0, cost)
    zero = op.CastLike(0.0, cost)
    n = op.Max(op.CastLike(op.Unsqueeze(num_templates, [1, 2]), cost), one)  # [B, 1, 1]
    m = op.Max(op.CastLike(op.Unsqueeze(num_proposals, [1, 2]), cost), one)
    real = op.Where(inside, cost, zero)
    step = op.CastLike(op.Constant(value_float=lr), cost) * real
    carried = op.CastLike(op.Constant(value_int=carry), cost)  # 1: Dykstra's corrections stay from step to step
    x = real * zero  # [B, N, M], NaN where the cost is not finite
    poison = op.ReduceSum(x, [1, 2], keepdims=1)
    total = x
    y = x
    u = op.ReduceSum(x, [2], keepdims=1)  # [B, N, 1]
    v = op.ReduceSum(x, [1], keepdims=1)  # [B, 1, M]
    for i in range(n_grad):
        y = carried * y + (one - carried) * x - step
        x = x - step
        u = carried * u
        v = carried * v
        for j in range(n_proj):
            d = op.Where(rows, (op.ReduceSum(x, [2], keepdims=1) - one) / m, zero)  # [B, N, 1]
            s = op.ReduceSum(x, [1], keepdims=1) - op.ReduceSum(d, [1], keepdims=1) + n * v  # [B, 1, M]
            u = u + d
            v = op.Relu((s - one) / n)
            x = op.Where(inside, op.Relu(y - u - v), zero)
        total = total + x
    count = op.CastLike(op.Constant(value_int=n_grad), cost) + carried  # the start counts
    result = op.Where(op.Cast(op.Constant(value_int=last), to=9), x, total / count)
    return op.Where(inside, result + poison, zero)


@script(dmm, default_opset=op)
def match_unmatched(
    cost, num_templates, num_proposals, unmatched_cost,
    n_grad: int = 40, n_proj: int = 5, lr: float = 0.1, carry: int = 0, last: int = 0,
):  # fmt: skip
    rows = op.Less(op.Range(0, op.Squeeze(op.Shape(cost, start=1, end=2)), 1), op.Unsqueeze(num_templates, [1]))  # [B, N]
    columns = op.Less(op.Range(0, op.Squeeze(op.Shape(cost, start=2, end=3)), 1), op.Unsqueeze(num_proposals, [1]))
    rows, columns = op.Unsqueeze(rows, [2]), op.Unsqueeze(columns, [1])  # [B, N, 1], [B, 1, M]
    inside = op.And(rows, columns)  # [B, N, M]
    one = op.CastLike(1.0, cost)
    zero = op.CastLike(0.0, cost)
    n = op.Max(op.CastLike(op.Unsqueeze(num_templates, [1, 2]), cost), one)  # [B, 1, 1]
    m = op.Max(op.CastLike(op.Unsqueeze(num_proposals, [1, 2]), cost), one)
    real = op.Where(inside, cost - op.Unsqueeze(unmatched_cost, [-1]), zero)
    step = op.CastLike(op.Constant(value_float=lr), cost) * real
    carried = op.CastLike(op.Constant(value_int=carry), cost)  # 1: Dykstra's corrections stay from step to step
    x = real * zero  # [B, N, M], NaN where the cost is not finite
    poison = op.ReduceSum(x, [1, 2], keepdims=1)
    total = x
    y = x
    u = op.ReduceSum(x, [2], keepdims=1)  # [B, N, 1]
    v = op.ReduceSum(x, [1], keepdims=1)  # [B, 1, M]
    for i in range(n_grad):
        y = carried * y + (one - carried) * x - step
        x = x - step
        u = carried * u
        v = carried * v
        for j in range(n_proj):
            d = op.Where(rows, (op.ReduceSum(x, [2], keepdims=1) - one) / m, zero)
            d = op.Max(d, -u)  # [B, N, 1]
            s = op.ReduceSum(x, [1], keepdims=1) - op.ReduceSum(d, [1], keepdims=1) + n * v  # [B, 1, M]
            u = u + d
            v = op.Relu((s - one) / n)
            x = op.Where(inside, op.Relu(y - u - v), zero)
        total = total + x
    count = op.CastLike(op.Constant(value_int=n_grad), cost) + carried  # the start counts
    result = op.Where(op.Cast(op.Constant(value_int=last), to=9), x, total / count)
    return op.Where(inside, result + poison, zero)


@script(dmm, default_opset=op)
def match_prices(
    cost, num_templates, num_proposals,
    n_grad: int = 40, n_proj: int = 1, lr: float = 10.0, last: int = 1,
):  # fmt: skip
    rows = op.Less(op.Range(0, op.Squeeze(op.Shape(cost, start=1, end=2)), 1), op.Unsqueeze(num_templates, [1]))  # [B, N]
    columns = op.Less(op.Range(0, op.Squeeze(op.Shape(cost, start=2, end=3)), 1), op.Unsqueeze(num_proposals, [1]))
    inside = op.And(op.Unsqueeze(rows, [2]), op.Unsqueeze(columns, [1]))  # [B, N, M]
    one = op.CastLike(1.0, cost)
    zero = op.CastLike(0.0, cost)
    gain = op.Where(inside, -cost, zero)
    steps = op.CastLike(op.Constant(value_int=n_grad), cost)
    sharpest = steps * op.CastLike(op.Constant(value_float=lr), cost)
    poison = op.ReduceSum(gain * zero, [1, 2], keepdims=1)  # NaN where the cost is not finite
    x = gain * zero  # [B, N, M]
    total = x
    best = op.ReduceMax(op.Where(inside, gain, op.CastLike(-1e30, cost)), [2], keepdims=1)
    a = best - steps * steps * steps / sharpest  # [B, N, 1]
    b = op.ReduceSum(x, [1], keepdims=1)  # [B, 1, M]
    for i in range(n_grad):
        share = (op.CastLike(i, cost) + one) / steps
        t = sharpest * share * share * share
        for j in range(n_proj):
            p = op.Where(inside, op.Relu(gain - a - b), zero)
            pos = op.CastLike(p > zero, cost)
            d = (op.ReduceSum(p, [2], keepdims=1) - one / t) / op.Max(op.ReduceSum(pos, [2], keepdims=1), one)
            s = op.ReduceSum(p - pos * d, [1], keepdims=1)
            a = a + d
            b = op.Relu(b + (s - one / t) / op.Max(op.ReduceSum(pos, [1], keepdims=1), one))
        x = op.Where(inside, t * op.Relu(gain - a - b), zero)
        total = total + x
    result = op.Where(op.Cast(op.Constant(value_int=last), to=9), x, total / steps)
    return op.Where(inside, result + poison, zero)


@script(dmm, default_opset=op)
def match_prices_unmatched(
    cost, num_templates, num_proposals, unmatched_cost,
    n_grad: int = 40, n_proj: int = 1, lr: float = 10.0, last: int = 1,
):  # fmt: skip
    rows = op.Less(op.Range(0, op.Squeeze(op.Shape(cost, start=1, end=2)), 1), op.Unsqueeze(num_templates, [1]))  # [B, N]
    columns = op.Less(op.Range(0, op.Squeeze(op.Shape(cost, start=2, end=3)), 1), op.Unsqueeze(num_proposals, [1]))
    inside = op.And(op.Unsqueeze(rows, [2]), op.Unsqueeze(columns, [1]))  # [B, N, M]
    one = op.CastLike(1.0, cost)
    zero = op.CastLike(0.0, cost)
    gain = op.Where(inside, op.Unsqueeze(unmatched_cost, [-1]) - cost, zero)
    steps = op.CastLike(op.Constant(value_int=n_grad), cost)
    sharpest = steps * op.CastLike(op.Constant(value_float=lr), cost)
    poison = op.ReduceSum(gain * zero, [1, 2], keepdims=1)  # NaN where the cost is not finite
    x = gain * zero  # [B, N, M]
    total = x
    best = op.ReduceMax(op.Where(inside, gain, op.CastLike(-1e30, cost)), [2], keepdims=1)
    a = op.Relu(best - steps * steps * steps / sharpest)  # [B, N, 1]
    b = op.ReduceSum(x, [1], keepdims=1)  # [B, 1, M]
    for i in range(n_grad):
        share = (op.CastLike(i, cost) + one) / steps
        t = sharpest * share * share * share
        for j in range(n_proj):
            p = op.Where(inside, op.Relu(gain - a - b), zero)
            pos = op.CastLike(p > zero, cost)
            d = (op.ReduceSum(p, [2], keepdims=1) - one / t) / op.Max(op.ReduceSum(pos, [2], keepdims=1), one)
            d = op.Max(d, -a)
            s = op.ReduceSum(p - pos * d, [1], keepdims=1)
            a = a + d
            b = op.Relu(b + (s - one / t) / op.Max(op.ReduceSum(pos, [1], keepdims=1), one))
        x = op.Where(inside, t * op.Relu(gain - a - b), zero)
        total = total + x
    result = op.Where(op.Cast(op.Constant(value_int=last), to=9), x, total / steps)
    return op.Where(inside, result + poison, zero)
