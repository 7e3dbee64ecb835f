"""CUDA C++ to a cubin by NVRTC: no nvcc, no host compiler, no GPU; kept by the hash of all that it is made from.

Nothing is compiled when this module is imported. NVRTC and the headers of CUDA come from NVIDIA's wheels, which a CUDA
build of torch brings as well.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...contracts import MoebenchError
from ..cpu.build import aside, cache_root, refuse_foreign

OPTIONS = ("-std=c++17", "-default-device")
"""Every function of a source is the device's, unless it says otherwise."""

INSTALL = "run pip install 'moebench[static]'"


@dataclass(frozen=True)
class Source:
    """One translation unit: its text, and our own headers by the names by which it includes them.

    Its kernels are ``extern "C"``: each is found in the code by the name that it has in the source.
    """

    name: str
    text: str
    headers: Mapping[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()

    @classmethod
    def read(cls, file: Path, options: Sequence[str] = ()) -> Source:
        """Return ``file`` with every header (``*.h``, ``*.cuh``) that lies beside it."""
        beside = sorted(path for path in file.parent.iterdir() if path.suffix in (".h", ".cuh") and path != file)
        return cls(file.name, file.read_text(), {path.name: path.read_text() for path in beside}, tuple(options))


def compile_source(source: Source, arch: str) -> bytes:
    """Return the cubin of ``source`` for ``arch`` (such as ``sm_90``), from the cache where that holds it.

    MoebenchError with the compiler's first error where it does not compile, or where NVRTC is not installed.
    """
    nvrtc = _nvrtc()
    headers = cuda_headers()
    options = (f"-arch={arch}", *OPTIONS, *source.options)
    key = _key(source, options, _version(nvrtc), headers)
    target = cache_root() / "kernels" / f"{Path(source.name).stem}-{arch}-{key[:16]}.cubin"
    if not target.is_file():
        made = _compiled(nvrtc, source, (*options, f"-I{headers}"))
        with aside(target) as file:
            file.write_bytes(made)
    refuse_foreign(target)
    return target.read_bytes()


def missing() -> str:
    """Return why nothing can be compiled here, or an empty string; nothing is loaded to find out."""
    try:
        cuda_headers()
        found = importlib.util.find_spec("cuda.bindings.nvrtc") is not None
    except MoebenchError as error:
        return str(error)
    except ModuleNotFoundError:
        found = False
    return "" if found else f"cuda-bindings is not installed; {INSTALL}."


def cuda_headers() -> Path:
    """Return the folder of CUDA's headers, of NVIDIA's wheel; MoebenchError where it is not installed."""
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(root) / "cu13" / "include"
        if (folder / "cuda_bf16.h").is_file():
            return folder
    raise MoebenchError(f"the headers of CUDA are not installed; {INSTALL}.")


def _nvrtc() -> Any:
    """Return NVRTC's bindings; they find the library when they are first called."""
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise MoebenchError(f"cuda-bindings is not installed; {INSTALL}.") from error
    return nvrtc


def _version(nvrtc: Any) -> tuple[int, int]:
    try:
        major, minor = _checked(nvrtc, nvrtc.nvrtcVersion())
    except RuntimeError as error:  # the bindings are there and the library is not
        raise MoebenchError(f"NVRTC is not installed; {INSTALL}.") from error
    return int(major), int(minor)


def _key(source: Source, options: Sequence[str], version: tuple[int, int], headers: Path) -> str:
    """Return the sha256 of everything that the code is made from; of CUDA's headers those that kernels include."""
    parts = [
        source.text.encode(),
        json.dumps([source.name, dict(source.headers), options, version], sort_keys=True).encode(),
        *(path.read_bytes() for path in sorted(headers.glob("cuda_*.h*"))),
    ]
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def _compiled(nvrtc: Any, source: Source, options: Sequence[str]) -> bytes:
    texts = [text.encode() for text in source.headers.values()]
    names = [name.encode() for name in source.headers]
    made = nvrtc.nvrtcCreateProgram(source.text.encode(), source.name.encode(), len(names), texts, names)
    program = _checked(nvrtc, made)
    try:
        (code,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if code != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise MoebenchError(f"{source.name} does not compile ({_first_error(nvrtc, program)}); mend it.")
        size: int = _checked(nvrtc, nvrtc.nvrtcGetCUBINSize(program))
        cubin = b" " * size
        _checked(nvrtc, nvrtc.nvrtcGetCUBIN(program, cubin))
        return cubin
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _first_error(nvrtc: Any, program: Any) -> str:
    log = b" " * _checked(nvrtc, nvrtc.nvrtcGetProgramLogSize(program))
    _checked(nvrtc, nvrtc.nvrtcGetProgramLog(program, log))
    lines = [line for line in log.decode(errors="replace").strip("\0 \n").splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else "it said nothing")


def _checked(nvrtc: Any, answer: tuple[Any, ...]) -> Any:
    """Return what a call answered beside its code; MoebenchError where the code is none of success."""
    code, *values = answer
    if code != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise MoebenchError(f"NVRTC answered {code.name}; {INSTALL}.")
    return values[0] if len(values) == 1 else tuple(values)
