"""The guard sees what it is there for, on kernels of a few lines, and computes bfloat16 as torch does."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from moebench.contracts import MoebenchError
from moebench.kernels.triton import guard, guard_floats
from moebench.kernels.triton.launch import compiling, launch
from moebench.kernels.triton.tiles import Tiles

TILES = Tiles()


@triton.jit
def shift_kernel(x_ptr, y_ptr, first, BLOCK: tl.constexpr):
    """Copy x[first + i] to y[i]."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + place, tl.load(x_ptr + first + place))


@triton.jit
def collide_kernel(y_ptr, step, BLOCK: tl.constexpr):
    """Store to blocks that begin ``step`` apart."""
    tl.store(y_ptr + tl.program_id(0) * step + tl.arange(0, BLOCK), tl.zeros((BLOCK,), tl.float32))


@triton.jit
def twice_kernel(y_ptr, BLOCK: tl.constexpr):
    """Store two numbers to each place."""
    tl.store(y_ptr + tl.arange(0, BLOCK) // 2, tl.zeros((BLOCK,), tl.float32))


@triton.jit
def feed_kernel(y_ptr, BLOCK: tl.constexpr):
    """Read what the program before has stored."""
    place = tl.arange(0, BLOCK)
    before = tl.load(y_ptr + tl.program_id(0) * BLOCK + place)
    tl.store(y_ptr + (tl.program_id(0) + 1) * BLOCK + place, before)


@triton.jit
def add_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """Add every program's block of x to the same block of y."""
    place = tl.arange(0, BLOCK)
    tl.atomic_add(y_ptr + place, tl.load(x_ptr + tl.program_id(0) * BLOCK + place))


@triton.jit
def mix_kernel(y_ptr, BLOCK: tl.constexpr):
    """Add to what other programs store."""
    place = tl.arange(0, BLOCK)
    zero = tl.zeros((BLOCK,), tl.float32)
    if tl.program_id(0) == 0:
        tl.store(y_ptr + place, zero)
    else:
        tl.atomic_add(y_ptr + place, zero)


@triton.jit
def arithmetic_kernel(x_ptr, y_ptr, out_ptr, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Compute with two vectors in their own dtype."""
    place = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place)
    y = tl.load(y_ptr + place)
    if KIND == "add":
        out = x + y
    elif KIND == "multiply":
        out = x * y
    elif KIND == "less":
        out = tl.where(x < y, x, y)
    elif KIND == "sum":
        out = y + tl.sum(x, axis=0)
    else:
        out = tl.fma(x, y, y)
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty))


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, BLOCK: tl.constexpr):
    """Multiply two square matrices."""
    row = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out_ptr + row, tl.dot(tl.load(a_ptr + row), tl.load(b_ptr + row), input_precision="ieee"))


def test_a_copy_within_bounds_is_counted():
    x, y = torch.arange(40.0), torch.zeros(32)
    with guard.counting() as counted:
        launch(shift_kernel, (2,), (x, y, 8), TILES, BLOCK=16)
    assert torch.equal(y, x[8:])
    assert counted == {"shift_kernel": guard.Traffic(programs=2, loaded=128, stored=128)}


@pytest.mark.parametrize("first", [9, -1, 10**6])
def test_loads_out_of_bounds_are_seen(first):
    with pytest.raises(
        guard.GuardError, match=r"load out of bounds: \d+ of 16 addresses lie beyond a tensor of \[40\]"
    ):
        launch(shift_kernel, (2,), (torch.arange(40.0), torch.zeros(32), first), TILES, BLOCK=16)


def test_a_view_ends_where_it_ends():
    """Numbers behind a view are there, and are not the kernel's."""
    with pytest.raises(guard.GuardError, match="load out of bounds"):
        launch(shift_kernel, (1,), (torch.arange(40.0)[:16], torch.zeros(32), 1), TILES, BLOCK=16)


def test_another_argument_is_out_of_bounds_too():
    both = torch.zeros(48)
    with pytest.raises(guard.GuardError, match="store out of bounds"):
        launch(shift_kernel, (2,), (both[16:], both[:16], 0), TILES, BLOCK=16)


def test_races_between_programs_are_seen():
    launch(collide_kernel, (2,), (torch.zeros(32), 16), TILES, BLOCK=16)
    with pytest.raises(guard.GuardError, match=r"program \(1, 0, 0\) of collide_kernel stores to what another program"):
        launch(collide_kernel, (2,), (torch.zeros(32), 15), TILES, BLOCK=16)
    with pytest.raises(guard.GuardError, match="stores twice to one number"):
        launch(twice_kernel, (1,), (torch.zeros(32),), TILES, BLOCK=16)
    with pytest.raises(guard.GuardError, match="loads what another program stores"):
        launch(feed_kernel, (2,), (torch.zeros(48),), TILES, BLOCK=16)
    with pytest.raises(guard.GuardError, match="adds to what another program stores"):
        launch(mix_kernel, (2,), (torch.zeros(16),), TILES, BLOCK=16)


def test_atomics_may_meet():
    x, y = torch.arange(64.0), torch.zeros(16)
    with guard.counting() as counted:
        launch(add_kernel, (4,), (x, y), TILES, BLOCK=16)
    assert torch.equal(y, x.view(4, 16).sum(0))
    assert counted["add_kernel"].added == 4 * 64


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("add", torch.add), ("multiply", torch.mul), ("less", torch.minimum)],
)
def test_bfloat16_is_computed_as_torch_does(kind, expected):
    x, y = (torch.randn(2048, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in (0, 1))
    out = torch.empty_like(x)
    launch(arithmetic_kernel, (1,), (x, y, out), TILES, KIND=kind, BLOCK=2048)
    assert torch.equal(out, expected(x, y))


@pytest.mark.parametrize("kind", ["sum", "fma"])
def test_bfloat16_that_is_not_mended_is_refused(kind):
    x = torch.ones(16).bfloat16()
    with pytest.raises(guard.GuardError, match=r"of bfloat16 wrongly; convert to float32 right after loading\."):
        launch(arithmetic_kernel, (1,), (x, x, torch.empty_like(x)), TILES, KIND=kind, BLOCK=16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_dots_are_sums_of_exact_products(dtype):
    a, b = (torch.randn(16, 16, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (0, 1))
    out = torch.empty(16, 16)
    launch(dot_kernel, (1,), (a, b, out), TILES, BLOCK=16)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_float32_is_rounded_to_nearest_even():
    bits = np.random.default_rng(0).integers(0, 2**32, 10**5, dtype=np.uint32)
    values = torch.from_numpy(bits.view(np.float32))
    finite = values[values.isfinite()]
    expected = finite.bfloat16().view(torch.uint16).numpy()
    assert (guard_floats.rounded(finite.numpy()) == expected).all()
    assert (guard_floats.widened(expected) == finite.bfloat16().float().numpy()).all()
    assert np.isnan(guard_floats.widened(guard_floats.rounded(np.array([np.nan], np.float32)))).all()


def test_the_interpreter_is_put_back_as_it_was():
    before = vars(triton.runtime.interpreter.InterpreterBuilder).copy()
    launch(shift_kernel, (1,), (torch.arange(40.0), torch.zeros(32), 0), TILES, BLOCK=16)
    assert vars(triton.runtime.interpreter.InterpreterBuilder) == before


def test_another_triton_is_refused(monkeypatch):
    guard.check_release.cache_clear()
    monkeypatch.setattr(triton, "__version__", "3.8.0")
    with pytest.raises(MoebenchError, match=r"knows triton 3\.7\.x, not 3\.8\.0; install triton==3\.7\.1"):
        guard.check_release()
    monkeypatch.undo()
    monkeypatch.delattr(triton.runtime.interpreter.InterpreterBuilder, "create_fma")
    with pytest.raises(MoebenchError, match="has no create_fma; install"):
        guard.check_release()
    monkeypatch.undo()
    guard.check_release()


def test_interpreted_kernels_are_not_compiled():
    from triton.backends.compiler import GPUTarget

    wanted = "start a process without TRITON_INTERPRET"
    with compiling(GPUTarget("cuda", 90, 32)), pytest.raises(MoebenchError, match=wanted):
        launch(shift_kernel, (1,), (torch.arange(40.0), torch.zeros(32), 0), TILES, BLOCK=16)
