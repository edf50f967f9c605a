"""Check that this device computes correctly: python -m extra.check [--device cuda]

One product in each format, and 8-bit attention where the GPU has it, compared with the dequantized operands. Exit
code 0 if all agree, 1 if not.
"""
import torch

import quant
import wan_fp4
from extra.attention import fp8_attention, has_fp8_kernel


def main(argv=None):
    parser = wan_fp4.Parser("python -m extra.check", description="Test each format on a device.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    with wan_fp4.one_line_errors("check.py"):
        raise SystemExit(0 if check(wan_fp4.check_device(parser.parse_args(argv).device)) else 1)


def check(device):
    """Print which path each format takes on this device, and why. Returns whether all products are right."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        reason = f"{torch.cuda.get_device_name(device)} is sm_{major}{minor} (tensor cores need sm_100 or later)"
    else:
        reason = f"{device} has no FP4 tensor cores"
    print(f"torch {torch.__version__}, {reason}")
    kinds = [("nvfp4", False), ("mxfp8", False)]
    if quant.default_mode(device) == "tensor_cores":  # elsewhere activations are not quantized
        kinds.append(("nvfp4", True))
    good = [check_format(fmt, two_pass, device) for fmt, two_pass in kinds]
    if has_fp8_kernel(device):
        qkv = [torch.randn(1, 2, 1000, 128, generator=torch.Generator().manual_seed(i)) for i in range(3)]
        # The kernel's running maximum rounds the probabilities differently, by up to 6 %
        good.append(agrees("fp8 attention", lambda: fp8_attention(*(x.to(device) for x in qkv)),
                           fp8_attention(*qkv), "its emulation", 0.05))
    return all(good)


def check_format(fmt, two_pass, device):
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(512, 256)
    linear.weight.data.normal_(generator=generator)
    x = torch.randn(160, 512, generator=generator).to(quant.default_dtype(device))  # as a real run feeds it
    mode = quant.default_mode(device)
    tested = quant.QuantLinear.from_linear(linear, fmt, two_pass=two_pass).to(device)
    plain = quant.QuantLinear.from_linear(linear, fmt, mode="emulate" if mode == "tensor_cores" else "dequantize",
                                          compute_dtype=torch.float32, two_pass=two_pass)
    path = f"{quant.FORMAT_NAMES[fmt]}{', two passes' if two_pass else ''}: {mode.replace('_', ' ')}"
    return agrees(path, lambda: tested(x.to(device)), plain(x.float()), "the dequantized product", 0.01)


def agrees(what, compute, expected, reference, bound):
    """Print whether compute() gives the expected tensor, and return it: the error's norm, relative to that of
    `expected`, must be below the bound. Rounding to bfloat16 alone gives 0.002."""
    try:
        y = compute().cpu().float()
    except RuntimeError as error:  # for instance no Triton, or a build of torch without the kernel
        print(f"{what}: FAILED: {error}")
        return False
    difference = ((y - expected).norm() / expected.norm()).item()
    print(f"{what}: differs from {reference} by {difference:.1e}: {'good' if difference < bound else 'WRONG'}")
    return difference < bound


if __name__ == "__main__":
    main()
