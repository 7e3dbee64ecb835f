"""Recipes compose in their order, and artefacts are found again exactly when nothing that made them has changed."""

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from moebench.contracts import Case, Choice, Descriptor, Evidence, MoebenchError, Registry, Selection
from moebench.moe import plugins, quantization, recipe, router_params, structure
from moebench.moe.artefacts import Artefact, cached, read, sources_sha256, tensors_sha256, write
from moebench.moe.channel_artefacts import sparsity_artefact, sparsity_of
from moebench.moe.channels import LowRank, SiteRule, Sparsity, WeightMask
from moebench.moe.codecs.rtn import round_to_nearest
from moebench.moe.layer import LayerWeights, SharedExpert, ffn_hidden, moe_forward
from moebench.moe.plugins import Int4, Split
from moebench.moe.recipe import Recipe, Stage, prepare_layer
from moebench.moe.routing import Context
from moebench.moe.shapes import ModelShape
from moebench.moe.sparsifiers import params as sparsity_params
from moebench.moe.sparsifiers import steps
from moebench.moe.sparsifiers.params import Teal
from moebench.moe.stage_artefacts import weights_artefact, weights_of

H, F, T = 16, 32, 80


@pytest.fixture(scope="module")
def registry():
    registry = Registry()
    registry.add(*plugins.DESCRIPTORS, *router_params.DESCRIPTORS, *sparsity_params.DESCRIPTORS)
    return registry


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense_shape():
    return ModelShape(H, F, 0, 2, (0, 1), Selection("softmax", 2, True))


def dense_weights(seed=1):
    return LayerWeights(randn(2 * F, H, seed=seed), randn(H, F, seed=seed + 1))


def stage(registry, kind, name, **overrides):
    descriptor = registry.get(kind, name)
    return Stage(descriptor, descriptor.params_from(overrides))


def make_recipe(registry, **stages):
    chosen = {
        "structure": ("split", {"experts": 4, "shared": 1, "k": 2}),
        "routing": ("topk", {}),
        "quantization": ("int4", {"group": 8}),
        "sparsity": ("teal", {"level": 0.5}),
        **stages,
    }
    return Recipe(**{kind: stage(registry, kind, name, **params) for kind, (name, params) in chosen.items()})


def prepare(which, cache=None, weights=None, calibration=None, seed=0, dtype=torch.float32, identity=None, shape=None):
    weights = dense_weights() if weights is None else weights
    calibration = randn(T, H) if calibration is None else calibration
    shape = which.structure.params.reshape(shape or dense_shape())
    return prepare_layer(which, weights, shape, calibration, seed, dtype, identity or {"layer": 1}, cache)


def forward(layer, seed=9, dtype=torch.float32):
    return moe_forward(layer, randn(T, H, seed=seed).to(dtype))


def artefacts(cache):
    return sorted((cache / "artefacts").iterdir()) if (cache / "artefacts").exists() else []


def stages_of(cache):
    return sorted(json.loads((folder / "meta.json").read_text())["inputs"]["stage"] for folder in artefacts(cache))


# --- composition -----------------------------------------------------------------------------------------------------


def test_stages_are_applied_in_order_each_on_the_result_so_far(registry):
    dtype = torch.bfloat16
    layer = prepare(make_recipe(registry), dtype=dtype)
    parts = structure.split(Split(4, 1, 2))(dense_weights(), randn(T, H), 0)
    assert torch.equal(layer.shared.down, parts.shared.down.to(dtype))
    wanted = [round_to_nearest(weight.to(dtype), Int4(8).scheme()) for weight in parts.gate_up]
    for ours, theirs in zip(layer.store.gate_up, wanted, strict=True):
        assert torch.equal(ours.dequantize(), theirs.dequantize())
    x = randn(T, H).to(dtype).float()
    bare = replace(layer.store, sparsity=None)
    assert layer.store.sparsity == steps.channels(Teal(0.5))(bare, layer.router(x, Context(layer=1)), x).sparsity
    assert forward(layer, dtype=dtype).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dense_weights_are_rounded_to_the_dtype_of_the_case(registry, dtype):
    weights = dense_weights()
    layer = prepare(make_recipe(registry, quantization=("none", {}), sparsity=("none", {})), dtype=dtype)
    parts = structure.split(Split(4, 1, 2))(weights, randn(T, H), 0)
    assert torch.equal(layer.store.gate_up, parts.gate_up.to(dtype))
    assert torch.equal(layer.store.down, parts.down.to(dtype))
    assert layer.shared.gate_up.dtype == dtype
    assert layer.store.sparsity is None


def test_a_split_with_every_slice_on_is_the_dense_ffn(registry):
    which = make_recipe(
        registry, structure=("split", {"experts": 4, "k": 4}), quantization=("none", {}), sparsity=("none", {})
    )
    weights, x = dense_weights(), randn(T, H, seed=9)
    y = moe_forward(prepare(which, weights=weights), x)
    torch.testing.assert_close(y, ffn_hidden(x, weights.gate_up, "silu") @ weights.down.T, rtol=1e-4, atol=1e-4)


def test_a_recipe_of_nothing_keeps_the_tensors_and_writes_nothing(registry, tmp_path):
    nothing = make_recipe(registry, structure=("none", {}), quantization=("none", {}), sparsity=("none", {}))
    shared = SharedExpert(randn(8, H), randn(H, 4), randn(H))
    weights = LayerWeights(randn(4, 2 * F, H), randn(4, H, F), randn(4, H), shared=shared)
    shape = ModelShape(H, F, 4, 2, (0, 1), Selection("softmax", 2, True), 4)
    layer = prepare(nothing, tmp_path, weights, shape=shape)
    assert layer.store.gate_up is weights.gate_up
    assert layer.store.down is weights.down
    assert layer.shared.down is shared.down
    assert artefacts(tmp_path) == []
    assert prepare(nothing, None, weights, dtype=torch.bfloat16, shape=shape).shared.gate_H.dtype == torch.bfloat16


def test_a_scheme_brings_its_shared_expert_where_the_layer_has_none(registry):
    nothing = {"structure": ("none", {}), "quantization": ("none", {}), "sparsity": ("none", {})}
    which = make_recipe(registry, routing=("pr_moe", {}), **nothing)
    weights = LayerWeights(randn(4, 2 * F, H), randn(4, H, F), randn(4, H))
    shape = ModelShape(H, F, 4, 2, (0, 1), Selection("softmax", 2, True))
    made, again, other = (prepare(which, None, weights, seed=seed, shape=shape).shared for seed in (0, 0, 1))
    assert torch.equal(made.gate_up, again.gate_up)
    assert not torch.equal(made.gate_up, other.gate_up)
    assert made.mix_2H.shape == (2, H)
    rounded = prepare(which, None, weights, dtype=torch.bfloat16, shape=shape).shared
    assert {rounded.gate_up.dtype, rounded.down.dtype, rounded.mix_2H.dtype} == {torch.bfloat16}
    own = SharedExpert(randn(8, H), randn(H, 4))
    kept = prepare(which, None, replace(weights, shared=own), shape=shape).shared
    assert kept.down is own.down
    assert kept.mix_2H is None


@pytest.mark.parametrize(
    "shared",
    [
        None,
        SharedExpert(randn(8, H), randn(H, 4), randn(H), "gelu"),
        SharedExpert(randn(4, H), randn(H, 4), mix_2H=randn(2, H), gated=False),
    ],
    ids=["none", "sigmoid", "softmax2"],
)
def test_shared_experts_survive_as_artefacts(tmp_path, shared):
    weights = LayerWeights(randn(4, 2 * F, H), randn(4, H, F), shared=shared)
    made = cached(tmp_path, {"a": 1}, lambda: weights, weights_artefact, weights_of)
    read = cached(tmp_path, {"a": 1}, lambda: None, weights_artefact, weights_of)
    assert made is weights
    assert (read.shared is None) == (shared is None)
    for name in ("gate_up", "down", "gate_H", "mix_2H", "activation", "gated") if shared is not None else ():
        one, other = getattr(read.shared, name), getattr(shared, name)
        assert torch.equal(one, other) if isinstance(other, torch.Tensor) else one == other


def test_other_kinds_of_experts_go_through_every_stage(registry, tmp_path):
    which = make_recipe(registry, routing=("moepp", {"residual": False}))
    first, second = prepare(which, tmp_path), prepare(which, tmp_path)
    assert first.store.kinds.count("constant") == 2
    assert torch.equal(forward(first), forward(second))
    assert forward(first).isfinite().all()


def test_the_recipe_of_a_case_is_what_its_axes_say(registry):
    chosen = {
        "structure": Choice("split", {"experts": 4}),
        "routing": Choice("topk", {"k": 3}),
        "quantization": Choice("int4", {"group": 32}),
        "sparsity": Choice("teal", {"level": 0.25}),
    }
    case = Case(
        "throughput", "1", "timed", Choice("m"), (0,), **chosen, backend=Choice("eager"), traffic=Choice("gaussian"),
        tokens=4, dtype="float32", pass_="forward", boundary="topk", threads=1, device="cpu", residency="warm",
        evidence=Evidence.MEASURED_CPU, seed=0, weights_sha256="0",
    )  # fmt: skip
    found = Recipe.of(case, registry)
    assert found.structure.params == Split(4)
    assert found.routing.params.k == 3
    assert found.quantization.params == Int4(32)
    assert found.sparsity.params == Teal(0.25)
    assert found.sparsity.descriptor.name == "teal"


# --- artefacts -------------------------------------------------------------------------------------------------------


def forbid(monkeypatch):
    def never(params):
        raise AssertionError("this stage should have been read from its artefact")

    monkeypatch.setattr(structure, "split", never)
    monkeypatch.setattr(quantization, "rtn", never)
    monkeypatch.setattr(steps, "channels", never)


@pytest.mark.parametrize("codec", [("int4", {"group": 8}), ("int8", {}), ("int8", {"group": 4, "symmetric": False})])
def test_second_call_reads_what_the_first_one_made_bit_for_bit(registry, tmp_path, monkeypatch, codec):
    which = make_recipe(registry, quantization=codec)
    made = prepare(which, tmp_path)
    assert stages_of(tmp_path) == ["quantization", "sparsity", "structure"]
    forbid(monkeypatch)
    again = prepare(which, tmp_path)
    assert torch.equal(forward(made), forward(again))
    assert again.store.sparsity == made.store.sparsity
    assert again.store.schemes == made.store.schemes
    assert again.store.nbytes == made.store.nbytes
    assert torch.equal(again.shared.gate_up, made.shared.gate_up)
    assert len(artefacts(tmp_path)) == 3
    with pytest.raises(AssertionError):
        prepare(which, tmp_path, seed=1)


def test_level_zero_stays_without_sparsity_when_read_again(registry, tmp_path):
    which = make_recipe(registry, sparsity=("teal", {"level": 0.0}))
    assert prepare(which, tmp_path).store.sparsity is None
    assert prepare(which, tmp_path).store.sparsity is None
    assert stages_of(tmp_path).count("sparsity") == 1


CHANGES = {
    "structure": {"structure": ("split", {"experts": 8, "shared": 1, "k": 2}), "quantization": ("int4", {"group": 4})},
    "quantization": {"quantization": ("int4", {"group": 4})},
    "sparsity": {"sparsity": ("teal", {"level": 0.6})},
    "routing": {"routing": ("topk", {"k": 1})},
}


@pytest.mark.parametrize(("what", "new"), [("structure", 3), ("quantization", 2), ("sparsity", 1), ("routing", 1)])
def test_a_changed_parameter_misses_from_its_stage_on(registry, tmp_path, what, new):
    prepare(make_recipe(registry), tmp_path)
    changed = make_recipe(registry, **CHANGES[what])
    fresh = prepare(changed, tmp_path)
    assert len(artefacts(tmp_path)) == 3 + new
    assert torch.equal(forward(fresh), forward(prepare(changed)))


@pytest.mark.parametrize(
    ("change", "new"),
    [
        ({"weights": dense_weights(seed=5)}, 3),
        ({"calibration": randn(T, H, seed=8)}, 3),
        ({"seed": 1}, 3),
        ({"identity": {"layer": 2}}, 3),
        ({"dtype": torch.bfloat16}, 2),
    ],
)
def test_other_weights_calibration_seed_identity_or_dtype_miss(registry, tmp_path, change, new):
    which = make_recipe(registry)
    prepare(which, tmp_path)
    prepare(which, tmp_path, **change)
    assert len(artefacts(tmp_path)) == 3 + new


def test_one_changed_weight_misses(registry, tmp_path):
    which, weights = make_recipe(registry), dense_weights()
    prepare(which, tmp_path, weights)
    weights.down[3, 4] += 1e-3
    prepare(which, tmp_path, weights)
    assert len(artefacts(tmp_path)) == 6


def test_changed_sources_miss(registry, tmp_path, monkeypatch):
    which = make_recipe(registry)
    prepare(which, tmp_path)
    monkeypatch.setattr(recipe, "sources_sha256", lambda factory: "edited")
    prepare(which, tmp_path)
    assert len(artefacts(tmp_path)) == 6


def test_sources_are_this_package_and_the_file_of_the_plug_in(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("a = 1\n")
    target = f"{file}:a"
    before = sources_sha256(target)
    file.write_text("a = 2\n")
    assert sources_sha256(target) == before
    sources_sha256.cache_clear()
    assert sources_sha256(target) != before
    folding = Stage(Registry.load().get("quantization", "eaquant"), SimpleNamespace(fold=target))
    known = folding.identity()
    file.write_text("a = 3\n")
    sources_sha256.cache_clear()
    assert folding.identity() != known
    assert sources_sha256("moebench.moe.structure:split") != sources_sha256("moebench.moe.sparsifiers.steps:channels")


@pytest.mark.parametrize("damage", ["tensors cut", "tensors gone", "meta cut", "meta edited", "a bit flipped", "empty"])
def test_a_damaged_artefact_is_built_again(registry, tmp_path, damage):
    which = make_recipe(registry)
    wanted = forward(prepare(which, tmp_path))
    for folder in artefacts(tmp_path):
        tensors, meta = folder / "tensors.safetensors", folder / "meta.json"
        data, text = tensors.read_bytes(), meta.read_text()
        if damage == "tensors cut":
            tensors.write_bytes(data[: len(data) // 2])
        elif damage == "tensors gone":
            tensors.unlink()
        elif damage == "meta cut":
            meta.write_text(text[: len(text) // 2])
        elif damage == "meta edited":
            meta.write_text(text.replace('"meta": {', '"meta": {"surplus": 1,'))
        elif damage == "a bit flipped":
            tensors.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        else:
            tensors.unlink()
            meta.unlink()
        assert read(folder) is None
    assert torch.equal(forward(prepare(which, tmp_path)), wanted)
    assert len(artefacts(tmp_path)) == 3
    assert all(read(folder) is not None for folder in artefacts(tmp_path))


def test_a_cache_that_cannot_be_written_is_told_in_a_sentence(registry, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(MoebenchError, match=r"cannot be written .* MOEBENCH_CACHE"):
        prepare(make_recipe(registry), blocked)


WRITER = """
import sys, torch
from pathlib import Path
from moebench.moe.artefacts import Artefact, cached, read, write
root = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for i in range(60):
    folder = root / str(i)
    write(folder, Artefact({"a": torch.full((2000,), float(i))}, {"i": i}), {})
    found = read(folder)
    if found is None or found.meta != {"i": i} or not bool((found.tensors["a"] == i).all()):
        sys.exit(f"artefact {i} is not whole")
"""


def test_two_processes_that_write_at_once_leave_whole_artefacts(tmp_path):
    for i in range(0, 60, 3):  # every third place holds a damaged one that both want to replace
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "meta.json").write_text("{")
    command, pipe = [sys.executable, "-c", WRITER, str(tmp_path)], subprocess.PIPE
    writers = [subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(2)]
    assert [writer.stdout.readline() for writer in writers] == ["ready\n"] * 2
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    messages = [writer.communicate(timeout=100)[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0], messages
    assert sorted(int(folder.name) for folder in tmp_path.iterdir()) == list(range(60))


def test_artefacts_hold_views_and_empty_sets(tmp_path):
    base = randn(4, 6)
    write(tmp_path / "a", Artefact({"x": base[:, ::2], "y": base[1:], "z": base}, {"n": 0.1}), {})
    back = read(tmp_path / "a")
    assert torch.equal(back.tensors["x"], base[:, ::2])
    assert back.meta == {"n": 0.1}
    write(tmp_path / "b", Artefact({}, {}), {})
    assert read(tmp_path / "b") == Artefact({}, {})
    assert read(tmp_path / "c") is None


def test_tensor_hash_knows_values_shape_dtype_and_order():
    a, b = randn(4, 2), randn(4, 2, seed=1)
    different = [
        [a],
        [a.bfloat16()],
        [a.view(2, 4)],
        [a, b],
        [b, a],
        [a, None],
        [torch.zeros(0)],
    ]
    assert len({tensors_sha256(tensors) for tensors in different}) == len(different)
    assert tensors_sha256([a]) == tensors_sha256([a.T.contiguous().T])


FOREIGN = """
import dataclasses
import torch
from moebench.contracts import Scheme

class Halves:
    scheme = Scheme("halves", 16.0)
    def __init__(self, weight):
        self.half, self.shape = weight.half(), tuple(weight.shape)
    @property
    def nbytes(self):
        return self.half.nbytes
    def parts(self):
        return {"half": self.half}
    def dequantize(self, dtype=torch.float32):
        return self.half.to(dtype)

def build(params):
    def quantize(store, seen):
        return dataclasses.replace(
            store, gate_up=[Halves(w) for w in store.gate_up], down=[Halves(w) for w in store.down]
        )
    return quantize
"""


def test_codes_of_a_plug_in_work_without_being_kept(registry, tmp_path):
    file = tmp_path / "halves.py"
    file.write_text(FOREIGN)
    which = replace(
        make_recipe(registry), quantization=Stage(Descriptor("quantization", "halves", "", f"{file}:build"), None)
    )
    first, second = prepare(which, tmp_path), prepare(which, tmp_path)
    assert first.store.quantized
    assert torch.equal(forward(first), forward(second))
    assert stages_of(tmp_path) == ["sparsity", "structure"]


@pytest.mark.parametrize(
    "made",
    [
        Sparsity({"input": SiteRule(0.1, weight=torch.rand(3, H))}),
        Sparsity({"gate": SiteRule(k=3), "hidden": SiteRule(kept=torch.rand(5) > 0.5)}),
        Sparsity(
            {"input": SiteRule(0.5, basis_II=torch.eye(H), residual=LowRank(torch.rand(3, 4, 2), torch.rand(3, 2, H)))}
        ),
        Sparsity({}, WeightMask(torch.rand(3, 4, H) > 0.5, torch.rand(3, H, 2) > 0.5)),
        None,
    ],
)
def test_a_plan_of_sparsity_comes_back(tmp_path, made):
    write(tmp_path / "a", sparsity_artefact(made), {})
    back = sparsity_of(read(tmp_path / "a"))
    assert (back is None) == (made is None)
    first, second = sparsity_artefact(made), sparsity_artefact(back)
    assert first.meta == second.meta
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(tensor, second.tensors[name]) for name, tensor in first.tensors.items())


def test_scaled_inputs_are_kept_apart_from_plain_ones_in_the_cache(registry, tmp_path):
    plain, scaled = (
        make_recipe(registry, routing=("moepp", {"released_inputs": released}), sparsity=("none", {}))
        for released in (False, True)
    )
    first, second = prepare(plain, tmp_path), prepare(scaled, tmp_path)
    assert torch.equal(second.store.dense()[0], prepare(scaled).store.dense()[0])
    assert not torch.equal(first.store.dense()[0], second.store.dense()[0])
