"""CUDA C++ to cubins by NVRTC, kept by the hash of what they are made from."""

from __future__ import annotations

import stat
from dataclasses import replace

import pytest

from moebench.contracts import MoebenchError
from moebench.kernels.cuda import nvrtc
from moebench.kernels.cuda.nvrtc import Source, compile_source

pytestmark = pytest.mark.usefixtures("nvrtc_here")

SCALE = Source(
    "scale.cu",
    '#include "factor.h"\n#include <cuda_bf16.h>\n'
    'extern "C" __global__ void scale(__nv_bfloat16* x) { x[threadIdx.x] *= __float2bfloat16(FACTOR); }\n',
    {"factor.h": "#define FACTOR 2.f\n"},
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEBENCH_CACHE", str(tmp_path))
    return tmp_path / "kernels"


def test_a_kernel_is_found_by_its_name_in_the_code(own_cache):
    assert b"scale" in compile_source(SCALE, "sm_90")
    assert [path.name.startswith("scale-sm_90-") for path in own_cache.iterdir()] == [True]


def test_the_second_time_nothing_is_compiled(own_cache, monkeypatch):
    first = compile_source(SCALE, "sm_80")
    monkeypatch.setattr(nvrtc, "_compiled", lambda *arguments: pytest.fail("compiled again"))
    assert compile_source(SCALE, "sm_80") == first


@pytest.mark.parametrize(
    "changed",
    [
        replace(SCALE, text=SCALE.text + "\n"),
        replace(SCALE, headers={"factor.h": "#define FACTOR 3.f\n"}),
        replace(SCALE, options=("-use_fast_math",)),
    ],
    ids=["text", "header", "options"],
)
def test_whatever_the_code_is_made_from_is_part_of_its_key(own_cache, changed):
    compile_source(SCALE, "sm_80")
    compile_source(changed, "sm_80")
    assert len(list(own_cache.iterdir())) == 2


def test_the_compiler_is_part_of_the_key():
    headers = nvrtc.cuda_headers()
    assert nvrtc._key(SCALE, (), (13, 0), headers) != nvrtc._key(SCALE, (), (13, 1), headers)


def test_a_mistake_in_the_source_is_told_in_one_sentence_and_nothing_is_kept(own_cache):
    with pytest.raises(MoebenchError, match=r"^scale.cu does not compile \(scale.cu\(4\): error: .*\); mend it\.$"):
        compile_source(replace(SCALE, text=SCALE.text + "oops\n"), "sm_80")
    assert not own_cache.exists()


def test_code_that_anybody_may_have_written_is_not_loaded(own_cache):
    compile_source(SCALE, "sm_80")
    (kept,) = own_cache.iterdir()
    kept.chmod(kept.stat().st_mode | stat.S_IWOTH)
    with pytest.raises(MoebenchError, match="can be written by everybody"):
        compile_source(SCALE, "sm_80")


def test_a_source_brings_the_headers_beside_it(tmp_path):
    (tmp_path / "scale.cu").write_text(SCALE.text)
    (tmp_path / "factor.h").write_text(SCALE.headers["factor.h"])
    assert Source.read(tmp_path / "scale.cu") == SCALE


def test_without_the_headers_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(nvrtc.importlib.util, "find_spec", lambda name: None)
    assert nvrtc.missing() == "the headers of CUDA are not installed; run pip install 'moebench[static]'."
