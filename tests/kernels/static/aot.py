"""Compiles a tiny matrix product with Triton for every target, and prints what its code is made of; run by a fixture.

A process of its own, because Triton decides at import whether it interprets.
"""

from __future__ import annotations

import dataclasses
import json

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from moebench.kernels.isa import Code, resources
from moebench.kernels.targets import TARGETS

ARGUMENTS = {"a": "*bf16", "b": "*bf16", "c": "*fp32", "k": "i32", "stride_a": "i32", "stride_b": "i32"}


@triton.jit
def product(a, b, c, k, stride_a, stride_b, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, k, DEPTH):
        left = tl.load(a + row[:, None] * stride_a + start + depth[None, :])
        right = tl.load(b + column[None, :] * stride_b + start + depth[:, None])
        total = tl.dot(left, right, total)
    tl.store(c + row[:, None] * stride_b + column[None, :], total)


def compiled(target):
    """Return the kernel for a target, with the alignment that a launch would find."""
    sizes = {"ROWS": 64, "COLUMNS": 64, "DEPTH": 32}
    source = ASTSource(
        fn=product,
        signature={**ARGUMENTS, **dict.fromkeys(sizes, "constexpr")},
        constexprs=sizes,
        attrs={(i,): [["tt.divisibility", 16]] for i in range(len(ARGUMENTS))},
    )
    platform = "cuda" if target.platform == "CUDA" else "hip"
    made = compile(source, GPUTarget(platform, target.arch, target.warp), {"num_warps": 4, "num_stages": 3})
    return Code(
        name=made.metadata.name,
        target=target,
        threads=4 * target.warp,
        shared=made.metadata.shared,
        binary=made.asm.get("cubin", b""),
        text=made.asm.get("amdgcn", ""),
    )


def main():
    found = {one.name: resources(compiled(one)) for one in TARGETS.values()}
    print(json.dumps({name: dataclasses.asdict(one) for name, one in found.items()}))


if __name__ == "__main__":
    main()
