"""Every expert on every token, weighted by the dense gate matrix: wasteful, and right."""

from __future__ import annotations

from moebench.contracts import Availability, ExecutedPath, Execution, Refusal


class Example:
    """The backend."""

    def availability(self):
        return Availability(True)

    def supports(self, spec):
        plain = set(spec.kinds) == {"ffn"} and spec.scheme is not None and spec.scheme.codec == "none"
        if not plain or not spec.gated or spec.boundary != "topk" or spec.sparsity is not None or spec.backward:
            return Refusal("example runs gated FFN experts with dense weights, forward only, from boundary topk")
        return Execution()

    def load(self, layers, specs):
        return ExampleSession({index: Layer(store, specs[index]) for index, store in layers.items()})


class Layer:
    """One layer: two einsums over all experts."""

    def __init__(self, store, spec):
        import torch

        from moebench.moe.experts import ACTIVATIONS

        self.torch = torch
        self.gate_up_E2FH, self.down_EHF = store.dense(getattr(torch, spec.dtype))
        self.activation = ACTIVATIONS[store.activation]

    def __call__(self, x_TH, indices_TK, weights_TK, out_TH=None):
        experts = len(self.gate_up_E2FH)
        gate_TE = x_TH.new_zeros(len(x_TH), experts + 1, dtype=weights_TK.dtype)  # the last column takes the padding
        gate_TE = gate_TE.scatter_add(1, indices_TK, weights_TK)[:, :experts].to(x_TH.dtype)
        gate, up = self.torch.einsum("th,efh->etf", x_TH, self.gate_up_E2FH).chunk(2, dim=-1)
        y_TH = self.torch.einsum("etf,ehf,te->th", self.activation(gate) * up, self.down_EHF, gate_TE)
        return y_TH if out_TH is None else out_TH.copy_(y_TH)


class ExampleSession:
    """Its layers."""

    def __init__(self, layers):
        self.layers = layers

    def layer(self, index):
        return self.layers[index]

    def hint(self, layer, experts, priority):
        pass

    def executed(self):
        return ExecutedPath("dense", kernels=("aten::bmm",))

    def events(self):
        return ()

    def resident_bytes(self):
        return sum(layer.gate_up_E2FH.nbytes + layer.down_EHF.nbytes for layer in self.layers.values())

    def close(self):
        self.layers = {}


def create(params):
    """Return the backend; it has no parameters."""
    return Example()
