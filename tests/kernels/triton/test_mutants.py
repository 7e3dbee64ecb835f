"""Kernels with a mistake in them: the oracle or the guard must see each, and some only the guard can see.

A mutant is an edit of one line of a module's text, which is loaded aside; its kernels then stand in for the right ones.
"""

import contextlib
import importlib
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from moebench.contracts import Scheme
from moebench.kernels.triton import combine, decode, dispatch, elementwise, grouped, guard, products, weights
from moebench.moe.codecs.rtn import round_to_nearest
from moebench.moe.experts import ExpertStore
from moebench.moe.oracle import compare, reference
from moebench.moe.routing import Routing

MODULES = {
    module.__name__.rsplit(".", 1)[1]: module
    for module in (combine, decode, dispatch, elementwise, grouped, products, weights)
}

HERE = "real[:, None] & known[None, :]\n        "
SEEN_BY_THE_GUARD_ALONE = {
    "unmasked tail of the inputs": ("grouped", HERE + "x = ", "real[:, None] & (known | True)[None, :]\n        x = "),
    "a plain sum where programs meet": (
        "grouped",
        'tl.atomic_add(out_ptr + token * HIDDEN + output[None, :], total, mask=here, sem="relaxed")',
        "at = out_ptr + token * HIDDEN + output[None, :]\n"
        "        tl.store(at, total + tl.load(at, mask=here, other=0.0), mask=here)",
    ),
}
MUTANTS = {
    **SEEN_BY_THE_GUARD_ALONE,
    "unmasked tail of the outputs": (
        "grouped",
        "unit[None, :], hidden, mask=here)",
        "unit[None, :], hidden, mask=real[:, None])",
    ),
    "a bound that is one too far": ("grouped", "inside = unit < WIDTH", "inside = unit <= WIDTH"),
    "every expert reads the weights of the first": ("weights", "of_codes = expert", "of_codes = 0 * expert"),
    "up reads the rows of gate": ("grouped", "up = unit + WIDTH", "up = unit + 0 * WIDTH"),
    "up is added to gate": ("grouped", "known, second, OUTPUTS", "known, first, OUTPUTS"),
    "no weighting": ("grouped", "total *= tl.load(weight_ptr", "total += 0 * tl.load(weight_ptr"),
    "padding is the first slot": (
        "dispatch",
        "(first + mine) * BLOCK_M, slots, BLOCK_M)",
        "(first + mine) * BLOCK_M, 0, BLOCK_M)",
    ),
    "positions that are one too far": ("dispatch", "tl.cumsum(here, axis=0) - 1", "tl.cumsum(here, axis=0)"),
    "experts begin where they end": ("dispatch", "experts < expert", "experts <= expert"),
    "no end of the blocks": ("grouped", "if block >= tl.load(blocks_ptr):", "if block < 0 * tl.load(blocks_ptr):"),
    "slots without an expert count": ("combine", "real = real & (which < EXPERTS)", "real = real & (which > -2)"),
    "sums in bfloat16": (
        "decode",
        "w.to(tl.float32) * tl.where(keep, x, 0.0)[None, :]",
        "w * tl.where(keep, x, 0.0).to(w.dtype)[None, :]",
    ),
    "a split is left out": ("decode", "for part in tl.static_range(PARTS):", "for part in tl.static_range(1, PARTS):"),
    "the second nibble first": ("weights", "tl.join(pair & 15, pair >> 4)", "tl.join(pair >> 4, pair & 15)"),
    "the scale of the first group": ("weights", "+ channel[None, :] // GROUP", "+ 0 * channel[None, :] // GROUP"),
}


def mutated(name, old, new, folder):
    """Return module ``name`` with ``old`` replaced, wherever it stands, loaded under a name of its own."""
    module = MODULES[name]
    text = Path(module.__file__).read_text()
    assert old in text, f"{name}.py has changed: it has no {old!r}"
    file = folder / f"{name}.py"
    file.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location(f"{module.__name__}_mutant", file)
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made
    spec.loader.exec_module(made)
    return made


@contextlib.contextmanager
def standing_in(mutant, name):
    """Put the mutant's functions where the right ones are used."""
    with pytest.MonkeyPatch.context() as patch:
        for attribute, right in vars(MODULES[name]).items():
            if hasattr(right, "arg_names") and right.fn.__module__ == MODULES[name].__name__:
                for user in MODULES.values():
                    if getattr(user, attribute, None) is right:
                        patch.setattr(user, attribute, getattr(mutant, attribute))
        yield


def layers(kernels):
    """Yield the rungs of the ladder: (dtype, right answer, what runs)."""
    generator = torch.Generator().manual_seed(7)
    shapes = ((3, 80, 56), (3, 56, 40))
    gate_up, down = (torch.randn(shape, generator=generator) / shape[2] ** 0.5 for shape in shapes)
    rank_TE = torch.rand(19, 3, generator=generator).argsort(1)
    count_T1 = (torch.arange(19)[:, None] + 1) % 3  # the last token has an expert: what lies behind it is nobody's
    routing = Routing.dense(torch.where(rank_TE < count_T1, torch.randn(19, 3, generator=generator), 0.0))
    x_TH = torch.randn(19, 56, generator=generator)
    for dtype in (torch.float32, torch.bfloat16):
        store = ExpertStore(gate_up.to(dtype), down.to(dtype), ("ffn",) * 3)
        experts, right = kernels.dense(store), reference(store, routing, x_TH.to(dtype))
        for plan in ({"combine": "atomic"}, {"combine": "deterministic"}):
            yield dtype, right, lambda e=experts, p=plan, d=dtype: kernels.run(e, x_TH.to(d), routing, **p)
        some = routing.part(0, 3)
        right = reference(store, some, x_TH[:3].to(dtype))
        yield (
            dtype,
            right,
            lambda e=experts, d=dtype, r=some: kernels.run(e, x_TH[:3].to(d), r, decode_tokens=3, splits=2),
        )
    store = coded(gate_up[:, :64, :48], down[:, :48, :32])
    session = kernels.backend.load({0: store}, {0: kernels.spec(store)})
    right = reference(store, routing, x_TH[:, :48])
    yield torch.float32, right, lambda: session.layer(0)(x_TH[:, :48].contiguous(), *routing.padded())


def coded(gate_up, down):
    scheme = Scheme("rtn", 4.0, 16, symmetric=False)
    parts = [tuple(round_to_nearest(one.contiguous(), scheme) for one in weights) for weights in (gate_up, down)]
    return ExpertStore(*parts, ("ffn",) * 3)


def survives(kernels):
    """Return whether every rung of the ladder is passed."""
    for dtype, right, run in layers(kernels):
        try:
            if not compare(run(), right, dtype).ok:
                return False
        except guard.GuardError:
            return False
    return True


@pytest.fixture
def ladder(kernels, lab):
    kernels.backend, kernels.spec = lab.backend("triton"), lab.spec
    return kernels


def test_the_kernels_pass(ladder):
    assert survives(ladder)


@pytest.mark.parametrize("title", MUTANTS)
def test_mutants_are_killed(ladder, title, tmp_path):
    name, old, new = MUTANTS[title]
    with standing_in(mutated(name, old, new, tmp_path), name):
        assert not survives(ladder)


@pytest.mark.parametrize("title", SEEN_BY_THE_GUARD_ALONE)
def test_without_the_guard_some_live(ladder, title, tmp_path, monkeypatch):
    """Rungs in float32 alone: without the guard bfloat16 is nonsense even in the right kernels."""
    monkeypatch.setattr(guard, "watching", lambda kernel: contextlib.nullcontext())
    name, old, new = SEEN_BY_THE_GUARD_ALONE[title]
    with standing_in(mutated(name, old, new, tmp_path), name):
        for dtype, right, run in layers(ladder):
            assert dtype != torch.float32 or compare(run(), right, dtype).ok
