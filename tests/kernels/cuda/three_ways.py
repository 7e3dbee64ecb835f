"""Layers of one file, run by a backend; as a program, by ``triton``, whose interpreter needs a process of its own.

Usage: three_ways.py LAYERS OUTPUTS, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import sys

import torch

from moebench.contracts import LayerSpec, Registry
from moebench.moe.experts import ExpertStore
from moebench.moe.routing import Routing

REGISTRY = Registry.load()

WAYS = {
    "triton": (
        {"combine": "deterministic", "decode_tokens": 0},
        {"combine": "atomic", "decode_tokens": 0},
        {"decode_tokens": 19},
    ),
    "cuda_fused": ({"variant": "fused"}, {"variant": "two_kernels"}, {"variant": "fused", "combine": "atomic"}),
}
"""Parameters by which each backend runs every layer."""


def read(path):
    """Return the layers of a file by name: (experts, routing, x_TH)."""
    made = {}
    for name, one in torch.load(path, weights_only=True).items():
        kinds = ("ffn",) * len(one["gate_up"])
        store = ExpertStore(one["gate_up"], one["down"], kinds, one["activation"], gated=True)
        routing = Routing(one["token_N"], one["expert_N"], one["weight_N"], (len(one["x_TH"]), len(kinds)))
        made[name] = store, routing, one["x_TH"]
    return made


def run(backend, params, store, routing, x_TH):
    """Return the output of one layer, and the executor that it came from."""
    dtype = str(x_TH.dtype).removeprefix("torch.")
    spec = LayerSpec(
        store.hidden,
        store.width,
        store.kinds,
        dtype=dtype,
        activation=store.activation,
        schemes=store.schemes,
        boundary="sorted",
    )
    executor = REGISTRY.get("backend", backend).create(params).load({0: store}, {0: spec}).layer(0)
    return executor(x_TH, *routing.sorted()), executor


def main():
    from moebench.kernels.triton import guard

    made = {}
    for name, layer in read(sys.argv[1]).items():
        for number, params in enumerate(WAYS["triton"]):
            with guard.counting() as counted:
                out_TH, _ = run("triton", params, *layer)
            made[f"{name} {number}"] = {"out_TH": out_TH, "flops": sum(one.flops for one in counted.values())}
    torch.save(made, sys.argv[2])


if __name__ == "__main__":
    main()
