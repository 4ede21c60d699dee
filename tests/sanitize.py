"""make sanitize: the CPU library's tests under AddressSanitizer and UndefinedBehaviorSanitizer.

Builds a second library into build/sanitize, loads it in place of the package's own in a fresh process that starts with the
sanitizers' runtimes, and runs calls that cover every kernel: sizes around the vector lengths, ragged, long (segmented) runs,
every instruction set, forward and backward, the exact assignment, the vision ops.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "sanitize"


def build() -> Path:
    import torch

    # pip's cmake sits beside the interpreter, which need not be on PATH
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    configure = ["cmake", "-S", ROOT, "-B", BUILD, "-DCMAKE_BUILD_TYPE=Release", "-DDMM_SANITIZE=ON"]
    subprocess.run([*configure, f"-DTORCH_DIR={Path(torch.__file__).parent}"], check=True)
    subprocess.run(["cmake", "--build", BUILD, "--parallel", "2"], check=True)
    return BUILD / "libdmm_cpu.so"


def runtime(name: str) -> str:
    return subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()


def exercise() -> None:
    """Without the package, whose import would load its own library."""
    import torch

    torch.ops.load_library(os.environ["DMM_SANITIZED"])
    torch.manual_seed(0)
    layers()
    assignments()
    overlaps()
    grids()
    print("no findings")


def layers() -> None:
    import torch

    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for B in (0, 1, 3, 16, 37):
            for N, M in ((1, 1), (5, 50), (7, 3), (9, 17), (20, 33), (3, 0), (0, 3)):
                cost, init = torch.rand(B, N, M).to(dtype), torch.rand(B, N, M).to(dtype)
                counts = torch.randint(0, N + 1, (B,)), torch.randint(0, M + 1, (B,))
                lr = torch.rand(B, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
                for n_grad, n_proj, carry, last in ((3, 2, False, False), (2, 3, True, True), (40, 5, True, False)):
                    options = (n_grad, n_proj, 0.1, carry, last)
                    torch.ops.dmm.match(cost, init, *counts, lr, *options)
                    torch.ops.dmm.match_backward(torch.rand_like(cost), cost, init, *counts, lr, *options)
                for n_grad, n_proj, last in ((3, 2, False), (40, 1, True)):
                    options = (n_grad, n_proj, 10.0, last)
                    torch.ops.dmm.match_prices(cost, *counts, lr, *options)
                    torch.ops.dmm.match_prices_backward(torch.rand_like(cost), cost, *counts, lr, *options)
    cost = torch.rand(2, 20, 200)
    torch.ops.dmm.match_backward(cost, cost, None, None, None, None, 60, 20, 0.1, True, False)  # segments


def assignments() -> None:
    import torch

    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        for B in (0, 1, 37):
            for N, M in ((1, 1), (5, 50), (7, 3), (9, 17), (33, 20), (16, 16), (3, 0), (0, 3), (65, 130), (130, 65)):
                cost = torch.rand(B, N, M).to(dtype)
                ties = torch.randint(0, 4, (B, N, M)).to(dtype)  # the longest paths, rows that stay alone
                forbidden = cost.masked_fill(torch.rand_like(cost) < 0.7, torch.inf)
                broken = torch.where(torch.rand_like(cost) < 0.5, torch.nan, -torch.inf * cost)
                counts = torch.randint(0, N + 1, (B,)), torch.randint(0, M + 1, (B,))
                own = torch.rand(B, N, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
                for given in (cost, ties, forbidden, broken, cost.mT.contiguous().mT):
                    for unmatched, bounds in (
                        (None, counts),
                        (own, counts),
                        (torch.rand_like(own[:1]).expand(B, N), (None, None)),
                    ):
                        torch.ops.dmm.linear_assignment(given, unmatched, *bounds)
                        torch.ops.dmm.linear_assignment_duals(given, unmatched, *bounds)
                if B > 0:
                    torch.ops.dmm.linear_assignment_duals(forbidden[0], own[0], None, None)
                    torch.ops.dmm.linear_assignment_duals(ties[0], None, None, None)


def overlaps() -> None:
    import torch

    for N, M, H, W in ((1, 1, 1, 1), (3, 5, 61, 67), (7, 50, 240, 427), (0, 4, 9, 9), (2, 0, 9, 9)):
        a, b = torch.rand(N, H, W) > 0.5, torch.rand(M, H, W) > 0.5
        torch.ops.dmm.mask_iou(a, b)
        torch.ops.dmm.mask_iou(a.expand(3, N, H, W), b.expand(3, M, H, W))
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            corners = (torch.rand(M, 4) * 2 * max(H, W) - W / 2).to(torch.float64 if dtype == torch.float64 else torch.float32)
            inputs = torch.rand(N, M).to(dtype), torch.rand(M, 28, 28).to(dtype), corners
            pasted = torch.ops.dmm.paste_combine(*inputs, H, W)
            torch.ops.dmm.paste_combine_backward(torch.rand_like(pasted), *inputs)


def grids() -> None:
    """Empty sides, a single cell, sizes around the vector lengths, and the largest that are allowed."""
    import torch

    strange = [
        [0, 0, 0, 5],
        [5, 5, 1, 1],
        [-1e30, -1e30, 1e30, 1e30],
        [torch.nan, 0, 5, 5],
        [0, 0, torch.inf, 5],
        [-5, -6, 4, 3],
    ]
    floats = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    end = 2**23 - 1
    pastes = [
        (0, 7, 5, 6, 2),
        (8, 0, 5, 6, 2),
        (8, 7, 0, 6, 2),
        (8, 7, 5, 0, 2),
        (8, 1, 1, 1, 1),
        (8, 3, 9, 8, 64),
        (9, 65, 1, 70, 2),
    ]
    for M, S, rows, columns, samples in [
        *pastes,
        (20, 14, 31, 67, 3),
        (50, 28, 135, 241, 2),
        (8, 3, 1, end, 2),
        (8, 3, end, 1, 2),
    ]:
        corner, extent = torch.rand(2, M, 2) * torch.tensor([columns, rows])
        near = torch.tensor([columns, rows] * 2).clamp(max=60)  # a box as long as the longest grid takes seconds
        boxes = torch.cat([corner, corner + extent.clamp(max=300)], 1) - torch.rand(M, 4) * near
        boxes[: len(strange)] = torch.tensor(strange)[:M]
        if max(rows, columns) == end:
            boxes[2] = torch.tensor([columns - 9, rows - 9, columns + 9, rows + 9])
        for dtype in floats:
            given = boxes.to(torch.float64 if dtype == torch.float64 else torch.float32)
            torch.ops.dmm.paste_masks(torch.rand(M, S, S).to(dtype), given, rows, columns, samples)

    no_run = 2**31 - 1
    codes = [(0, 4, 20, 20, 10, 10), (3, 0, 20, 20, 10, 10), (3, 4, 20, 20, 0, 10), (3, 4, 20, 20, 10, 0), (5, 3, 1, 1, 1, 1)]
    codes += [(5, 3, 1, 1, 5, 40), (4, 9, 1, 90, 1, 13), (4, 9, 90, 1, 13, 1), (6, 9, 5, 7, 13, 16), (9, 31, 37, 53, 37, 53)]
    codes += [
        (50, 301, 135, 241, 34, 61),
        (3, 400, 31, 37, 30, 36),
        (2, 5, 65535, 32768, 2, 65535),
        (2, 5, 32768, 65535, 65535, 2),
    ]
    for M, R, height, width, rows, columns in codes:
        places = torch.randint(0, height * width + 1, (M, R)).sort(1).values
        runs = torch.where(torch.arange(R) < torch.randint(0, R + 1, (M, 1)), places, no_run).int()  # padded
        wild = torch.randint(-(2**31), no_run, (M, R)).int()
        for given in (runs, places.int(), places.flip(1).int(), wild, runs[:, ::2]):
            torch.ops.dmm.decode_runs(given, height, width, rows, columns)

    labels = [
        (0, 3, 3, 5, 6),
        (3, 3, 3, 0, 6),
        (3, 3, 3, 6, 0),
        (1, 1, 1, 1, 1),
        (2, 1, 1, 7, 5),
        (3, 1, 9, 1, 70),
        (3, 9, 1, 70, 1),
    ]
    labels += [(4, 10, 11, 10, 11), (5, 40, 33, 13, 9), (255, 3, 4, 9, 11), (4, 34, 61, 135, 241), (3, 2, 2, 65, 513)]
    for N, h, w, height, width in [*labels, (2, 1, 3, 1, 2**24 - 1), (2, 3, 1, 2**24 - 1, 1)]:
        logits, rank = torch.randn(N, h, w), torch.randint(-3, 3, (N,))
        for dtype in floats:
            torch.ops.dmm.upsample_argmax(logits.to(dtype), rank, height, width)
            torch.ops.dmm.upsample_argmax(-logits.abs().to(dtype), rank, height, width)  # background alone

    for shape, images in (((2, 5, 3, 7), 1), ((1, 32, 6, 7), 0), ((3, 1, 1, 1), 3), ((0, 3, 4, 4), 0), ((2, 3, 0, 4), 2)):
        for dtype, layout in itertools.product(floats, (torch.contiguous_format, torch.channels_last)):
            x, bias = torch.randn(shape).to(dtype).contiguous(memory_format=layout), torch.randn(shape[1]).to(dtype)
            residual = torch.randn(images, *shape[1:]).to(dtype) if images else None
            torch.ops.dmm.bias_clamp(x, bias, residual, 0.0, 6.0)


def main() -> None:
    if "DMM_SANITIZED" in os.environ:
        return exercise()
    library = build()
    for capability in ("portable", "avx2", "avx512"):
        print(f"{capability}: ", end="", flush=True)
        environment = {
            **os.environ,
            "DMM_SANITIZED": str(library),
            "DMM_CPU_CAPABILITY": capability,
            "LD_PRELOAD": f"{runtime('libasan.so')}:{runtime('libubsan.so')}",
            "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
            "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        }
        subprocess.run([sys.executable, __file__], env=environment, check=True)


if __name__ == "__main__":
    main()
