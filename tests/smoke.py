"""What an installed dmm_fast must do, whatever the torch: ``python tests/smoke.py layer|programs|segment|live``.

Run by `matrix.py` and the packaging tests with an environment's own Python, outside the source tree. The last line printed sums up.
"""

from __future__ import annotations

import sys

import torch


def layer() -> str:
    """Forward and backward against the reference; nothing heavy is imported, CUDA is not started."""
    import dmm_fast

    heavy = {"scipy", "torchvision", "timm", "matplotlib", "PIL", "triton", "torch._dynamo"} & set(sys.modules)
    assert not heavy, f"importing dmm_fast imported {heavy}"
    assert not torch.cuda.is_initialized(), "importing dmm_fast started CUDA"
    torch.manual_seed(0)
    cost = torch.rand(3, 5, 50, dtype=torch.float64).requires_grad_()
    grad = torch.rand_like(cost)
    x, y = dmm_fast.match(cost, n_grad=5), dmm_fast.match(cost, n_grad=5, backend="reference")
    a, b = (torch.autograd.grad(value, cost, grad)[0] for value in (x, y))
    off = max((x - y).abs().max().item(), (a - b).abs().max().item())
    assert off < 1e-10, off
    whole = torch.ones(3, 8, 8, dtype=torch.bool)
    assert dmm_fast.mask_iou(whole[:2], whole).eq(1).all()
    choice = dmm_fast.linear_assignment(torch.tensor([[1.0, 9.0], [9.0, 1.0]]))
    assert choice.tolist() == [0, 1], choice
    info = dmm_fast.build_info()
    assert info["backends"]["cpu"].startswith("native")
    return f"{torch.__version__} {dmm_fast.__file__} built against {info['built against torch']}: off by {off:.0e}"


class Matching(torch.nn.Module):
    def forward(self, cost: torch.Tensor) -> torch.Tensor:
        return torch.ops.dmm.match(cost, None, None, None, n_grad=8)


def programs() -> str:
    """torch.ops.dmm.match in a script and in an exported program."""
    import dmm_fast

    cost = torch.rand(2, 4, 9)
    expected = dmm_fast.match(cost, n_grad=8)
    assert torch.equal(torch.jit.script(Matching())(cost), expected)
    dynamic = {"cost": {0: torch.export.Dim("batch")}}
    exported = torch.export.export(Matching(), (torch.rand(3, 4, 9),), dynamic_shapes=dynamic)
    assert torch.equal(exported.module()(cost), expected)
    return "the same from a script and an exported program"


def segment(proposer: bool = False) -> str:
    """The packaged network on a made clip, with the clip's proposals or the packaged proposal network's."""
    import numpy as np
    from dmm_fast.model import Proposals
    from dmm_fast.model.masks import mask_boxes

    import dmm_fast
    from dmm_fast.data.synthetic import synthetic_clip

    clip = synthetic_clip(seed=7, frames=5, size=(240, 432), objects=2)
    options = {}
    if proposer:
        from dmm_fast.proposals.detector import packaged_detector

        options["proposer"] = packaged_detector()
    segmenter = dmm_fast.Segmenter(**options)
    segmenter.start(clip.frames[0], clip.ids[0])
    ious = []
    for frame, ids, (masks, scores) in zip(clip.frames[1:], clip.ids[1:], clip.proposals[1:]):
        masks = torch.from_numpy(masks)
        given = None if proposer else Proposals(mask_boxes(masks), torch.from_numpy(scores).float(), masks)
        found = segmenter.step(frame, given).ids
        ious += [((found == i) & (ids == i)).sum() / ((found == i) | (ids == i)).sum() for i in np.unique(ids[ids > 0])]
    mean = float(np.mean(ious))
    assert mean > 0.7, f"mean IoU {mean:.2f}"
    return f"mean IoU {mean:.2f} over {len(ious)} objects"


def live() -> str:
    return segment(proposer=True)


if __name__ == "__main__":
    print({"layer": layer, "programs": programs, "segment": segment, "live": live}[sys.argv[1]]())
