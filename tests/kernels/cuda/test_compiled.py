"""What NVRTC makes of the sources: nothing spills, and products and copies are those that they ask for."""

from __future__ import annotations

import pytest

from moebench.kernels.cuda import host, layer, nvrtc, symmetric
from moebench.kernels.isa import Code, resources
from moebench.kernels.targets import TARGETS

pytestmark = pytest.mark.skipif(bool(nvrtc.missing()), reason=nvrtc.missing() or "-")


@pytest.mark.parametrize("arch", ["sm_80"])
def test_kernels_do_not_spill_and_use_tensor_cores_and_asynchronous_copies(arch):
    tiles = layer.Tiles()
    source = nvrtc.Source.read(host.SOURCES / "symmetric.cuh", (*tiles.options, layer.ONLY["bfloat16"]))
    binary = nvrtc.compile_source(source, arch)
    for name in (*layer.SIGNATURES, *symmetric.SIGNATURES):
        if not name.endswith("_bfloat16"):
            continue
        found = resources(Code(name, TARGETS[arch], tiles.threads, tiles.shared_bytes(64), binary))
        assert (found.stack, found.spills) == (0, 0)
        assert found.kinds["tensor"] > 0
        assert found.kinds["async_copy"] > 0
