"""What a compiled kernel is made of: registers, stack, spills, shared memory and instructions. Imports no torch.

CUDA code (a cubin) is read by cuobjdump (and nvdisasm, which it calls), of Triton's wheel or of NVIDIA's; AMD's is read
as the text that Triton keeps beside it. A kernel that spills may show few registers: look at stack and spills first.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..contracts import MoebenchError
from .targets import Target

TOOL_SECONDS = 120
"""A disassembler that takes longer hangs."""

INSTALL = "run pip install 'moebench[static]'"

CUDA_KINDS = {
    "tensor": r"(H|I|Q|D|B|O)G?MMA|UTC[A-Z]*MMA",
    "async_copy": r"LDGSTS|UBLKCP|UTMALDG",
    "barrier": r"BAR",
    "atomic": r"REDG?|ATOMG?",
    "spill": r"LDL|STL",
}
"""Kinds of instructions by the opcodes of SASS; a further part of an opcode, after a point, is left out."""

AMD_KINDS = {
    "tensor": r"v_(mfma|smfmac|wmma)_\w+",
    "async_copy": r"global_load_lds_\w+|buffer_load_\w+_lds",
    "barrier": r"s_barrier\w*",
    "atomic": r"(global|flat|buffer)_atomic_\w+",
}
"""Kinds of instructions by the opcodes of AMD's text. Scratch is no sign of a spill there: metadata counts those."""

_RESOURCES = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_SASS = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", re.MULTILINE)
_AMD = re.compile(r"^\t([a-z]+_[a-z0-9_]+)(?:\s|$)", re.MULTILINE)


@dataclass(frozen=True)
class Code:
    """One kernel as a compiler left it. ``threads`` per block; ``shared`` bytes are asked for at launch (dynamic)."""

    name: str
    target: Target
    threads: int
    shared: int
    binary: bytes = b""
    text: str = ""


@dataclass(frozen=True)
class Resources:
    """What a kernel needs: registers a thread, bytes of stack a thread, bytes of shared memory a block.

    ``spills`` counts loads and stores of spilled registers: instructions on CUDA, registers on ROCm. ``shared`` is
    without the driver's own. ``kinds`` counts instructions by kind, ``instructions`` counts them all.
    """

    registers: int
    stack: int
    spills: int
    shared: int
    instructions: int
    kinds: Mapping[str, int]


def resources(code: Code) -> Resources:
    """Return what ``code`` needs; MoebenchError where the tools are absent or cannot read it."""
    return _of_cubin(code) if code.target.platform == "CUDA" else of_amd_text(code.text, code.shared)


def _of_cubin(code: Code) -> Resources:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(code.binary)
        told = _run([tool("cuobjdump"), "--dump-resource-usage", str(file)])
        listing = _run([tool("cuobjdump"), "--dump-sass", "--function", code.name, str(file)])
    reserved = 0 if code.target.name == "sm_80" else code.target.shared_reserved  # told from sm_90 on
    return of_sass(code.name, told, listing, code.shared, reserved)


def of_sass(name: str, told: str, listing: str, dynamic: int, reserved: int) -> Resources:
    """Return the resources of kernel ``name`` from what cuobjdump ``told`` of a cubin, and its ``listing`` of it.

    Of the static shared memory that cuobjdump tells, ``reserved`` bytes are the driver's, where there is any.
    """
    found = {match[1]: tuple(map(int, match.groups()[1:])) for match in _RESOURCES.finditer(told)}
    if name not in found:
        raise MoebenchError(f"the code has no kernel '{name}' but {', '.join(found) or 'none'}; give one of its names.")
    registers, stack, static, local = found[name]
    opcodes = Counter(_SASS.findall(listing))
    kinds = count_kinds(opcodes, CUDA_KINDS)
    spills = kinds.pop("spill")
    return Resources(registers, stack + local, spills, max(0, static - reserved) + dynamic, opcodes.total(), kinds)


def of_amd_text(text: str, dynamic: int) -> Resources:
    """Return the resources of the one kernel in AMD's ``text``; accumulation registers count as registers."""
    fields = ("vgpr_count", "group_segment_fixed_size", "private_segment_fixed_size")
    told = {name: _amd_field(text, name) for name in (*fields, "vgpr_spill_count", "sgpr_spill_count")}
    opcodes = Counter(_AMD.findall(text.partition(".amdgpu_metadata")[0]))
    return Resources(
        registers=told["vgpr_count"],
        stack=told["private_segment_fixed_size"],
        spills=told["vgpr_spill_count"] + told["sgpr_spill_count"],
        shared=told["group_segment_fixed_size"] + dynamic,
        instructions=opcodes.total(),
        kinds=count_kinds(opcodes, AMD_KINDS),
    )


def _amd_field(text: str, name: str) -> int:
    found = re.search(rf"\.{name}:\s+(\d+)", text)
    if found is None:
        raise MoebenchError(f"the text of the kernel tells no {name}; use the triton that pyproject.toml names.")
    return int(found[1])


def count_kinds(opcodes: Mapping[str, int], kinds: Mapping[str, str]) -> dict[str, int]:
    """Return how many of ``opcodes`` are of each of ``kinds``."""
    return {
        kind: sum(number for opcode, number in opcodes.items() if re.fullmatch(pattern, opcode))
        for kind, pattern in kinds.items()
    }


def tool(name: str) -> str:
    """Return the path of ``cuobjdump``, say: Triton's, or that of NVIDIA's wheel."""
    for package, place in (("triton", "backends/nvidia/bin"), ("nvidia", "cu13/bin")):
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or ()) if spec else ():
            if (found := Path(root) / place / name).is_file():
                return str(found)
    raise MoebenchError(f"{name} is not installed; {INSTALL}.")


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TOOL_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MoebenchError(f"{command[0]} does not run ({error}); {INSTALL}.") from error
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[0]
        raise MoebenchError(f"{command[0]} cannot read the code ({said}); {INSTALL}.")
    return done.stdout
