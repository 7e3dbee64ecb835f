"""Launching: everything but the driver's own calls, and the driver that is not there."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moebench.contracts import MoebenchError
from moebench.kernels.cuda.driver import CudaDriver, Module, marshal
from moebench.kernels.devices import missing


class Sizes(ctypes.Structure):
    _fields_ = (("rows", c_int32), ("columns", c_int64))


SIGNATURES = {"add": (c_void_p, c_int32, c_float, c_int64), "take": (Sizes,), "nothing": ()}


class FakeDriver:
    """Keeps what was asked of it, and reads the arguments from memory as the driver does: by address and width."""

    def __init__(self):
        self.asked = []

    def load(self, code):
        return code

    def function(self, module, name):
        self.asked.append(("function", module, name))
        return name

    def allow_shared(self, function, size):
        self.asked.append(("allow", function, size))

    def launch(self, function, grid, block, shared, arguments):
        kinds = SIGNATURES[function]
        addresses = (c_void_p * len(kinds)).from_address(arguments)
        read = [kind.from_address(address) for kind, address in zip(kinds, addresses, strict=True)]
        values = [one if isinstance(one, ctypes.Structure) else one.value for one in read]
        self.asked.append(("launch", function, grid, block, shared, values))

    def unload(self, module):
        self.asked.append(("unload", module))


@pytest.fixture
def driver():
    return FakeDriver()


@pytest.fixture
def module(driver):
    return Module(driver, b"code", SIGNATURES)


def test_kernels_are_looked_up_once(driver, module):
    assert [one[2] for one in driver.asked] == ["add", "take", "nothing"]
    module.close()
    assert driver.asked[-1] == ("unload", b"code")


def test_arguments_arrive_with_their_widths(driver, module):
    x = torch.zeros(4)
    module.launch("add", (2, 1, 1), (128, 1, 1), 1024, (x, -5, 0.5, 2**40))
    assert driver.asked[-1] == ("launch", "add", (2, 1, 1), (128, 1, 1), 1024, [x.data_ptr(), -5, 0.5, 2**40])
    module.launch("nothing", (1, 1, 1), (32, 1, 1), 0, ())
    assert driver.asked[-1][-1] == []


def test_a_structure_is_passed_whole(driver, module):
    module.launch("take", (1, 1, 1), (32, 1, 1), 0, (Sizes(3, 2**35),))
    (sizes,) = driver.asked[-1][-1]
    assert (sizes.rows, sizes.columns) == (3, 2**35)


def test_much_shared_memory_is_asked_for_once(driver, module):
    for shared in (48 * 1024, 96 * 1024, 96 * 1024, 64 * 1024, 100 * 1024):
        module.launch("nothing", (1, 1, 1), (32, 1, 1), shared, ())
    assert [one[2] for one in driver.asked if one[0] == "allow"] == [96 * 1024, 100 * 1024]


@given(value=st.integers(-(2**63), 2**63 - 1))
def test_an_integer_is_passed_as_it_is_or_refused(value):
    if -(2**31) <= value < 2**31:
        assert marshal("k", (c_int32,), (value,))[0].value == value
    else:
        with pytest.raises(MoebenchError, match="argument 0 of kernel 'k' does not hold"):
            marshal("k", (c_int32,), (value,))


def test_what_is_no_argument_is_refused(module):
    with pytest.raises(MoebenchError, match="takes 4 arguments, not 1"):
        module.launch("add", (1, 1, 1), (1, 1, 1), 0, (1,))
    with pytest.raises(MoebenchError, match="argument 1 of kernel 'add' is no c_int"):
        module.launch("add", (1, 1, 1), (1, 1, 1), 0, (None, 1.5, 0.0, 1))
    with pytest.raises(MoebenchError, match="unknown kernel 'tak': did you mean 'take'"):
        module.launch("tak", (1, 1, 1), (1, 1, 1), 0, ())


def test_without_a_driver_one_sentence_says_so():
    if not missing("CUDA"):
        pytest.skip("a CUDA device is here")
    with pytest.raises(MoebenchError, match=r"^no CUDA device: .*; kernels are launched on .* alone\.$"):
        CudaDriver()
