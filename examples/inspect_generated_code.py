"""Show the code that the backend generates for one attention layer: C++ for the CPU, Triton for GPUs.

    python examples/inspect_generated_code.py            # what each kernel does, then the same steps in both languages
    python examples/inspect_generated_code.py --full     # everything, as Inductor runs it

The Triton is generated in a second process, from fake CUDA tensors under a stand-in for a GPU; it is neither compiled nor
run.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from torch._inductor.utils import run_and_get_code

from alignedkv_compile import lowering, ops
from alignedkv_compile.layout import arena_layout
from alignedkv_compile.own_kernels import post_grad_pass

KERNELS = {
    "quantize_on_write": "new rows of K and V become 4-bit planes, scales and sums of blocks",
    "scan": "all scores from K's 4-bit plane, sums over their weights, and theta, the error that every addend is held to",
    "finish": "lists of the rows that deserve more bits; those of K and V, block means for the rest; the output",
    "repair": "streams what finish has left to it, mostly nothing",
    "lenient": "query rows that a floating mask prohibits everything",
    "stream": "all bits, where planes do not pay: flash decoding",
    "combine": "the splits' parts become the output, rounded once",
    "count": "what was read, for alignedkv_compile.stats()",
}


def generated_cpp() -> str:
    """The C++ of one decode step's read."""
    lowering.register()
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 32, 1, 128), *torch.randn(2, 1, 8, 1024, 128).bfloat16()
    planes = torch.zeros(arena_layout(key, value).total, dtype=torch.uint8)

    def layer(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, planes: torch.Tensor) -> torch.Tensor:
        return ops.aligned_read_attention.default(
            query, key, value, planes, None, None, 1024, 128**-0.5, 0.0, 2.0, 2.0**-8, 512
        )

    with torch._inductor.config.patch(post_grad_custom_post_pass=post_grad_pass("example"), fx_graph_cache=False):
        _, sources = run_and_get_code(torch.compile(layer, fullgraph=True), query, key, value, planes)
    return str(sources[0])


def generated_triton() -> str:
    """The module that Inductor writes for one decode step on a GPU."""
    benchmarks = Path(__file__).resolve().parents[1] / "benchmarks"
    program = "import gpu_codegen as g; g.stand_in_for_cuda(g.DEVICES['sm_90']); print(g.generate(g.Call(128)))"
    return subprocess.run([sys.executable, "-c", program], cwd=benchmarks, capture_output=True, text=True, check=True).stdout


def excerpt(source: str, first: str, last: str) -> str:
    """Lines from the one that holds ``first`` to the next that holds ``last``."""
    lines = source.splitlines()
    begin = next(i for i, line in enumerate(lines) if first in line)
    end = next(i for i, line in enumerate(lines[begin:], begin) if last in line)
    return "\n".join(lines[begin : end + 1])


def main() -> None:
    """Print both programs, annotated."""
    console = Console()
    cpp, triton = generated_cpp(), generated_triton()
    if "--full" in sys.argv:
        console.print(cpp, triton, markup=False, highlight=False)
        return
    made = re.findall(r"KERNEL_NAME : tl\.constexpr = '(\w+)'", triton)
    table = Table("kernel", "what it does", title="Triton: kernels in the order of their launches")
    for name in dict.fromkeys(made):
        table.add_row(name, KERNELS[name])
    console.print(table)
    console.rule("Triton: scores of a tile of rows from the 4-bit plane, nothing else of K is read")
    console.print(Syntax(excerpt(triton, "def plane_scores(", "return (dots"), "python"))
    console.rule("C++: the same, 16 rows of the plane at once")
    console.print(Syntax(excerpt(cpp, "void score_rows(", "vf score ="), "cpp"))
    console.rule("The error model, printed from one sympy expression into both")
    console.print(Syntax(excerpt(triton, "def threshold(", "return"), "python"))
    console.print(Syntax(excerpt(cpp, "float threshold(", "return"), "cpp"))


if __name__ == "__main__":
    main()
