"""A trial of one MoE layer on one backend: the timed call is boundary inputs -> y, shared experts included.

Inputs rotate with the step. Each step has two variants of its inputs in the same buffers, exchanged before each turn
and each round through the steps, so that an answer, or an order of the assignments, remembered from an earlier call is
a wrong one. Each round starts with outputs full of NaN. Copies of cold weights are taken in turn by the calls.

With another device than the CPU, stores, inputs and outputs lie there; references are computed on the CPU in float64.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from ..contracts import Case, Check, Cost, Facts, LayerSpec, Metric, Registry, Series, make_key
from ..moe.channel_use import needed_work
from ..moe.experts import ExpertStore
from ..moe.fold import Folded, fold_store
from ..moe.metrics import load_series, routing_metrics
from ..moe.oracle import Reference, compare, reference
from ..moe.placement import placed
from ..moe.routing_metrics.cost import weights_per_token
from ..moe.sparsifiers.cost import sparsity_metrics
from .cold import cold_copies, copies_key, rotated, touched_share
from .digest import sha256_of
from .leaving_out import leaving_out
from .subject import DTYPES, Batch, Subject, gate_metrics, make_batch, prepare_subject
from .traffic_kinds import exact_share, told

T = TypeVar("T")

STEPS = 3
VARIANTS = 2
"""Different inputs, and how many of them each step has."""

_REFERENCES: dict[str, Reference] = {}
_COPIES: dict[str, list[ExpertStore]] = {}


class LayerTrial:
    """One layer, forward pass. See the module for what is timed and what is checked."""

    state: Literal["none"] = "none"
    steps = STEPS

    def __init__(self, case: Case, registry: Registry) -> None:
        self.case, self.registry = case, registry
        self.subject: Subject = prepare_subject(case, registry)
        self.batches = self._make_batches()
        self._variant = 0
        self.input_sha256 = sha256_of(*(t for batch in self.batches for t in (batch.x_TH, *batch.inputs)))
        self.references = [self._reference(batch) for batch in self.batches]  # before a backend sees the weights
        stores = self._stores()
        self._copies = len(stores)
        folded = case.execution.folded
        spec = self.subject.spec.folded() if folded else self.subject.spec
        backend = registry.get("backend", case.backend.name).create(case.backend.params)
        loaded = {index: fold_store(store) if folded else store for index, store in enumerate(stores)}
        self.session = backend.load(loaded, dict.fromkeys(loaded, spec))
        self.executors = itertools.cycle([self._executor(index, store) for index, store in enumerate(stores)])
        self.shared = self._here(self.subject.layer.shared)
        self.given = [(self._here(batch.x_TH), self._here(batch.inputs)) for batch in self.batches]
        self.x = [x_TH.clone() for x_TH, _ in self.given[:STEPS]]
        self.inputs = [tuple(t.clone() for t in inputs) for _, inputs in self.given[:STEPS]]
        self.out = [torch.empty_like(x) for x in self.x]

    def _make_batches(self) -> list[Batch]:
        """Return the batches, variant after variant: batch of (step, variant) is at variant * STEPS + step."""
        numbers = range(STEPS * VARIANTS)
        return [make_batch(self.case, self.registry, self.subject, number) for number in numbers]

    def _here(self, value: T) -> T:
        """Return ``value`` with its tensors on the case's device; on the CPU it is the same object."""
        return value if self.case.device == "cpu" else placed(value, self.case.device)

    def _back(self, value: T) -> T:
        """Return ``value`` with its tensors on the CPU, where references are."""
        return value if self.case.device == "cpu" else placed(value, "cpu")

    def _stores(self) -> list[ExpertStore]:
        """Return the layer's store; for cold weights as many copies as pass the last cache, shared by all trials.

        Trials whose methods differ in activation sparsity alone share the weights, and each has its own rules. On a GPU
        there is one store: whoever times the calls overwrites the L2 before each.
        """
        store, spec, device = self.subject.layer.store, self.subject.spec, self.case.device
        if device == "cpu" and not rotated(self.case):
            return [store]
        key = f"{device} {copies_key(self.case, spec)}"
        if key not in _COPIES:
            _COPIES[key] = [store if device == "cpu" else placed(replace(store, sparsity=None), device)]
        copies, count = _COPIES[key], 1
        if rotated(self.case):
            count = cold_copies(self.case.workload["cache_bytes"], store.nbytes, touched_share(spec))
        copies.extend(replace(copy.deepcopy(store), sparsity=None) for _ in range(count - len(copies)))
        return [replace(one, sparsity=self._here(store.sparsity)) for one in copies[:count]]

    def _executor(self, index: int, store: ExpertStore) -> Any:
        executor = self.session.layer(index)
        return Folded(executor, store) if self.case.execution.folded else executor

    def _reference(self, batch: Batch) -> Reference:
        key = make_key([self.case.method_key, self.case.dtype, sha256_of(batch.x_TH, *batch.inputs)])
        if key not in _REFERENCES:
            layer = self.subject.layer
            _REFERENCES[key] = reference(layer.store, batch.routing, batch.x_TH, layer.shared)
        return _REFERENCES[key]

    def _batch_number(self, step: int) -> int:
        return self._variant * STEPS + step % STEPS

    def begin_turn(self) -> None:
        """Exchange the inputs for the other variant, in place, and fill the outputs with NaN."""
        self._variant = 1 - self._variant
        for step, x_TH in enumerate(self.x):
            new_TH, inputs = self.given[self._batch_number(step)]
            x_TH.copy_(new_TH)
            self.inputs[step] = tuple(map(_exchanged, self.inputs[step], inputs))
        for out_TH in self.out:
            out_TH.fill_(torch.nan)

    def run(self, step: int) -> Tensor:
        """Call the backend, on the next copy of the weights, with the inputs of ``step``; add what is always on."""
        out_TH = self.backend_call(step)
        if self.shared is not None:
            with torch.no_grad():
                self.shared.add_to_(out_TH, self.x[step % STEPS])
        return out_TH

    def backend_call(self, step: int) -> Tensor:
        """Call the backend alone: what is always on is the layer's own, and its operators are not the backend's."""
        place = step % STEPS
        out_TH = self.out[place]
        with torch.no_grad():
            next(self.executors)(self.x[place], *self.inputs[place], out_TH=out_TH)
        return out_TH

    def verify(self, step: int, output: Tensor) -> Check:
        """Compare the output of ``step``, brought to the CPU, with the reference of the inputs that it had."""
        return compare(self._back(output), self.references[self._batch_number(step)], self.x[0].dtype)

    def cost(self, step: int) -> Cost:
        """Return the least work of one call, with the distinct experts that its routing touches.

        The footprint of cold weights is what the calls really read of all copies: experts that no input chooses do not
        push others out of a cache, and neither do channels that are skipped.
        """
        batch = self.batches[step % STEPS]
        cost = layer_cost(self.subject, batch, self.case)
        if self._copies == 1:
            return cost
        used_E = torch.stack([other.routing.counts_E for other in self.batches]).sum(0) > 0
        used = int(used_E[list(self.subject.layer.store.ffn_ids)].sum())
        footprint = self._copies * used * expert_bytes(self.subject, self.case)
        if self.case.execution.sparse == "skip":
            once = shared_parameters(self.subject) * batch.x_TH.element_size() + 2 * batch.x_TH.nbytes
            footprint = self._copies * (cost.bytes - once)  # what is always on is not copied, nor are activations
        return replace(cost, footprint=footprint)

    def facts(self) -> Facts:
        """Return routing metrics, the load per expert, densities, what really ran and what a replay did."""
        batch = self.batches[0]
        store = self.subject.layer.store
        metrics = routing_metrics(batch.routing, self.subject.spec.kinds)
        metrics.extend(sparsity_metrics(store, batch.routing, batch.x_TH))
        if self.subject.spec.sparsity is not None:
            metrics.extend(leaving_out(store, batch, self.session.events()))
        metrics.append(Metric("resident_bytes", float(self.session.resident_bytes()), "byte"))
        metrics.append(Metric("expert_bytes", float(store.nbytes), "byte"))
        if store.quantized:
            weights = len(store.ffn_ids) * self.subject.spec.matrices * store.hidden * store.width
            metrics.append(Metric("bits_per_weight", 8.0 * store.nbytes / weights, "bit"))
        metrics.append(Metric("weight_copies", float(self._copies), "1"))
        metrics.extend(gate_metrics([self.subject.layer]))
        metrics.extend(active_parameters(self.subject, self.batches))
        layer = self.case.layers[0]
        series = [replace(load_series(batch.routing, layer), step=0)]
        notes: dict[str, str] = {}
        traffic = self.registry.get("traffic", self.case.traffic.name).create(self.case.traffic.params)
        if traffic.forced:
            experts, k = self.subject.spec.experts, self.subject.spec.max_k
            series.append(Series("requested_share", traffic.requested(experts, k, layer=layer), "1", layer, 0))
            if hasattr(traffic, "audit"):
                steps = range(STEPS * VARIANTS)
                audits = [traffic.audit(self.case.tokens, experts, k, step, layer) for step in steps]
                metrics.append(exact_share(audits))
                notes["reason"] = told(audits)
        return Facts(tuple(metrics), tuple(series), executed=self.session.executed(), notes=notes)

    def close(self) -> None:
        """Free the backend's session."""
        self.session.close()


def _exchanged(buffer: Tensor, new: Tensor) -> Tensor:
    """Return ``new`` in ``buffer``, or in a new one where the shape is another: the number of assignments may vary."""
    return buffer.copy_(new) if buffer.shape == new.shape else new.clone()


def expert_bytes(subject: Subject, case: Case) -> float:
    """Return the bytes of one expert that owns weights, as the case's backend reads it."""
    store, spec = subject.layer.store, subject.spec
    if case.execution.weights == "packed":
        return store.nbytes / max(1, len(store.ffn_ids))
    return float(spec.matrices * spec.hidden * spec.width * DTYPES[case.dtype].itemsize)


def attention_flops(batch: Batch, spec: LayerSpec) -> float:
    """Return the flops of scores and of values mixed by them, of causal attentions over one sequence; 0 without any."""
    if not spec.heads:
        return 0.0
    return 4.0 * spec.width * float((batch.routing.token_N + 1).sum())


def layer_cost(subject: Subject, batch: Batch, case: Case) -> Cost:
    """Return the least work of a layer: 2 flops per weight and assignment; each touched expert's bytes once.

    Where the execution skips what is left out, only weights behind channels that are kept count: for each token in the
    flops, and once for all tokens of a call in the bytes. A mask saves neither. An attention also meets the tokens up
    to each of its own, with a product for the score and one for the value.
    """
    store, spec = subject.layer.store, subject.spec
    ffn_ids = list(store.ffn_ids)
    counts = batch.routing.counts_E[ffn_ids]
    distinct, assigned = int((counts > 0).sum()), int(counts.sum())
    per_expert = spec.matrices * spec.hidden * spec.width
    element = batch.x_TH.element_size()
    shared_size = shared_parameters(subject)
    products, read = assigned * per_expert, distinct * expert_bytes(subject, case)
    if case.execution.sparse == "skip":
        work = needed_work(store, batch.routing, batch.x_TH)
        products, read = work.products, float(work.weights * element)
    moved = read + shared_size * element + 2 * batch.x_TH.nbytes
    return Cost(
        flops=2.0 * (products + case.tokens * shared_size) + attention_flops(batch, spec),
        bytes=float(moved),
        distinct_experts=distinct,
        assignments=int(batch.routing.counts_E.sum()),
        footprint=float(moved),
    )


def shared_parameters(subject: Subject) -> int:
    """Return the size of the matrices that are always on."""
    shared = subject.layer.shared
    return 0 if shared is None else shared.gate_up.numel() + shared.down.numel()


def active_parameters(subject: Subject, batches: Sequence[Batch]) -> tuple[Metric, Metric]:
    """Return ``active_params_per_token``, and ``router_parameters``, which it includes.

    Active are the weights of a token's experts (in the mean over all inputs, by the Routings that run), those that are
    always on, and the router's. The router is counted as in the sizes of models, though a layer's time is without it.
    """
    spec = subject.spec
    routings = [batch.routing for batch in batches]
    own = weights_per_token(routings, spec.kinds, spec.hidden, spec.width, spec.gated)
    router = sum(parameter.numel() for parameter in subject.layer.router.parameters())
    active = None if own is None else own + shared_parameters(subject) + router
    tokens = sum(routing.num_tokens for routing in routings)
    return Metric("active_params_per_token", active, n=tokens), Metric("router_parameters", float(router), n=1)
