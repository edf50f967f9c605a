"""LoRAs in one file, and LoRAs merged into a model.

    python -m extra.loras A.safetensors:0.8 B.safetensors -o C.safetensors    joins LoRAs, for use at strength 1
    python convert.py -i MODEL --merge-lora A.safetensors:0.8 ...             merges before analyzing and rounding

ComfyUI applies only the last of several bypass nodes, so LoRAs beside a quantized model must be one file.
"""
import shlex
import sys
from pathlib import Path

import torch

import convert
import wan_fp4

DIFFERENCES = {"weight": "diff", "bias": "diff_b", "modulation": "diff_m"}  # parameter -> ending in a LoRA file


def main(argv=None):
    with wan_fp4.one_line_errors("extra/loras.py"):
        parser = wan_fp4.Parser("extra.loras", usage="python -m extra.loras FILE[:STRENGTH]... -o OUT",
                                description="Join several LoRAs in one file, for use at strength 1.")
        parser.add_argument("loras", nargs="+", metavar="FILE[:STRENGTH]")
        parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT")
        args = parser.parse_args(argv)
        loras = [wan_fp4.parse_lora(text) for text in args.loras]
        convert.check_overwritten([args.output], [file for path, _ in loras for file in wan_fp4.shards(path)])
        tensors = join_loras(loras)
        made = shlex.join(["extra/loras.py", *map(str, sys.argv[1:] if argv is None else argv)])
        made = made.encode(errors="replace").decode()  # file names need not be valid text
        wan_fp4.write_safetensors(args.output, tensors, {"quantization_command": made})
        layers, size = sum(name.endswith(".alpha") for name in tensors), args.output.stat().st_size
        print(f"{len(loras)} LoRAs in one: {layers} layers, {len(tensors) - 3 * layers} differences\n"
              f"{convert.gib(size)}: {args.output}")


def join_loras(loras):
    """(file, strength) pairs -> the tensors {name: tensor} of one LoRA that does at strength 1 what all do.

    Ranks are concatenated, with strength and alpha multiplied into up; whole differences are added. A dtype of 16
    bits that all files share is kept, otherwise it is float32. Raises ValueError for LoRAs that do not fit
    together.
    """
    terms, tensors = {}, {}  # terms: {(parameter, number of factors): [(shape, scale, factors)]}
    with torch.device("meta"):
        known = dict(wan_fp4.WanDiT().named_parameters())
    for path, strength in loras:
        for name, shape, scale, factors in wan_fp4.lora_terms(path, strength):
            if name not in known:  # ComfyUI would skip it
                raise ValueError(f"{path}: {name}: got a name that is no parameter of Wan's DiT, expected names "
                                 f"such as blocks.0.self_attn.q.weight; use LoRAs for this model")
            same = terms.setdefault((name, len(factors)), [])
            same.append((shape, scale, factors))
            if shape != same[0][0]:
                raise ValueError(f"{path}: {name}: got a difference of shape {shape}, expected {same[0][0]}, as "
                                 f"in the files before it; give LoRAs for one model")
    for (name, count), group in terms.items():
        dtypes = {factor.dtype for _, _, factors in group for factor in factors}
        dtype = dtypes.pop() if dtypes in ({torch.bfloat16}, {torch.float16}) else torch.float32
        scaled = [scale * factors[0].float() for _, scale, factors in group]
        if count == 2:
            up = torch.cat(scaled, dim=1).to(dtype)  # (M, r)
            down = torch.cat([down.to(dtype) for _, _, (_, down) in group])  # (r, K)
            tensors |= zip(convert.lora_names(name), (up, down, torch.tensor(float(len(down)))))
        else:
            layer, _, part = name.rpartition(".")
            tensors[f"diffusion_model.{layer}.{DIFFERENCES[part]}"] = sum(scaled).to(dtype)
    for name, tensor in tensors.items():
        if not tensor.abs().amax().isfinite():
            raise ValueError(f"{name}: gives NaN or infinite values, expected finite ones; get undamaged files, "
                             f"or lower their strengths")
    return tensors


class MergedSource(convert.Source):
    """A checkpoint with LoRAs merged into it, factors and whole differences. Prints how much of each is merged,
    and what is skipped and why. Raises ValueError if nothing fits, for wrong shapes and damaged factors."""

    def __init__(self, path, loras):
        super().__init__(path)
        self.terms = {}  # {tensor's name: what LoRAs add to it, as wan_fp4.lora_terms gives it}
        for text in loras:
            print(self.merge(*wan_fp4.parse_lora(text)))

    def merge(self, path, strength):
        merged, skipped = 0, []
        for name, shape, scale, factors in wan_fp4.lora_terms(path, strength):
            expected = self.shapes.get(name)
            if expected is None or len(factors) == 2 and len(expected) != 2:
                skipped.append(f"{name} ({'no such tensor' if expected is None else 'not a Linear'})")
                continue
            if shape != expected:
                raise ValueError(f"{path}: {name}: got a difference of shape {shape}, expected {expected}; use a "
                                 f"LoRA for a model of this size")
            self.terms.setdefault(name, []).append((path, scale, factors))
            merged += 1
        self.files = self.files + wan_fp4.shards(path)
        used = f"merged into {merged} tensors" if merged else ""
        return f"{path} at {strength:g}: {wan_fp4.with_skipped(used, skipped, path)}"

    def tensor(self, name):
        """A tensor with its LoRAs: the sum in float32, rounded once to the tensor's dtype."""
        tensor = super().tensor(name)
        if name not in self.terms:
            return tensor
        total = tensor.float()
        for path, scale, factors in self.terms[name]:
            first, *down = (factor.float() for factor in factors)
            total = total.addmm(first, *down, alpha=scale) if down else total.add(first, alpha=scale)
        total = total.to(tensor.dtype)
        if not total.abs().amax().isfinite():
            raise ValueError(f"{path}: {name}: gives NaN or infinite values, expected finite ones; get an "
                             f"undamaged LoRA, or lower its strength")
        return total


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be valid text
    main()
