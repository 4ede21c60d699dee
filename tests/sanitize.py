"""make sanitize: the CPU library's tests under AddressSanitizer and UndefinedBehaviorSanitizer.

Builds a second library into build/sanitize, loads it in place of the package's own in a fresh process that starts with the
sanitizers' runtimes, and runs calls that cover every kernel: sizes around the vector lengths, ragged, long (segmented) runs,
every instruction set, forward and backward, and the vision ops.
"""

from __future__ import annotations

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
    import torch

    torch.ops.load_library(os.environ["DMM_SANITIZED"])
    torch.manual_seed(0)
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
                own = torch.rand(B, N, dtype=lr.dtype)
                for given in (cost, cost.masked_fill(torch.rand_like(cost) < 0.7, torch.inf)):
                    torch.ops.dmm.linear_assignment_duals(given, None, *counts)
                    torch.ops.dmm.linear_assignment_duals(given, own, *counts)
                for n_grad, n_proj, last in ((3, 2, False), (40, 1, True)):
                    options = (n_grad, n_proj, 10.0, last)
                    torch.ops.dmm.match_prices(cost, *counts, lr, *options)
                    torch.ops.dmm.match_prices_backward(torch.rand_like(cost), cost, *counts, lr, *options)
    cost = torch.rand(2, 20, 200)
    torch.ops.dmm.match_backward(cost, cost, None, None, None, None, 60, 20, 0.1, True, False)  # segments
    for N, M, H, W in ((1, 1, 1, 1), (3, 5, 61, 67), (7, 50, 240, 427), (0, 4, 9, 9), (2, 0, 9, 9)):
        a, b = torch.rand(N, H, W) > 0.5, torch.rand(M, H, W) > 0.5
        torch.ops.dmm.mask_iou(a, b)
        corners = torch.rand(M, 4) * 2 * max(H, W) - W / 2
        torch.ops.dmm.paste_combine(torch.rand(N, M), torch.rand(M, 28, 28), corners, H, W)
    print("no findings")


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
