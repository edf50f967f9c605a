"""What quantizing an activation for the tensor cores moves through memory: python bench/activation.py

Step by step, counted on the meta device: the bytes that every operation reads and writes, over the bytes of
the activation (32,768 x 5120, bf16). Compiled: the buffers in the compiler's program, each written, and read
once where something else is made of it. At the least x is read twice, for the tensor scale is that of all of
x, and the codes are written: 2.25 for NVFP4, and 1.5 for MXFP8, which has none.
"""
import re
import sys
from pathlib import Path

import torch
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import quant  # noqa: E402


class Moved(TorchDispatchMode):
    """Adds up what operations that make a new tensor, or change one, read and write."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        views = any(r.alias_info and not r.alias_info.is_write for r in function._schema.returns)
        if not views and function is not torch.ops.aten.empty.memory_format:
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            self.bytes += sum(t.nbytes for t in tensors)
        return out


def step_by_step(fmt):
    x = torch.empty(32768, 5120, dtype=torch.bfloat16, device="meta")
    with Moved() as moved:
        quant.quantize_rows(x, fmt, None)
    return moved.bytes / x.nbytes


def compiled(fmt):
    """The dtype and shape of every buffer, for x of 4096 x 5120 on the CPU."""
    x = torch.randn(4096, 5120).bfloat16()
    _, programs = run_and_get_code(torch.compile(quant.quantize_rows), x, fmt, None)
    buffers = re.findall(r"buf\d+ = empty_strided_cpu\((\(.*?\)), \(.*?\), torch\.(\w+)\)", programs[0])
    return [f"{dtype} {shape}" for shape, dtype in buffers]


@torch.no_grad()
def main():
    print(f"torch {torch.__version__}")
    for fmt in ("nvfp4", "mxfp8"):
        print(f"{quant.FORMAT_NAMES[fmt]}: step by step {step_by_step(fmt):.1f} times the activation's bytes; "
              f"compiled, 4096 x 5120 makes {', '.join(compiled(fmt))}")


if __name__ == "__main__":
    main()
