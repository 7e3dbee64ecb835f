"""How many blocks of a kernel a multiprocessor holds at once: arithmetic on what a compiler reports. Imports no torch.

NVIDIA publishes the rules as a header (``cuda_occupancy.h`` of its runtime), with which the tests compare. Occupancy is
what may be resident together, and says nothing of speed.
"""

from __future__ import annotations

from dataclasses import dataclass

from .targets import Target


@dataclass(frozen=True)
class Occupancy:
    """Blocks that a multiprocessor holds (0: the kernel cannot be launched) and the share of its warps that they are.

    ``limits`` names what allows no more blocks: registers, shared memory, threads or blocks.
    """

    blocks: int
    share: float
    limits: tuple[str, ...]


def occupancy(target: Target, threads: int, registers: int, shared: int) -> Occupancy:
    """Return the occupancy of blocks of ``threads`` that use ``registers`` each and ``shared`` bytes in all.

    ``shared`` counts static and dynamic shared memory, without what the driver reserves.
    """
    if threads < 1:
        raise ValueError(f"threads={threads} must be at least 1")
    warps = -(-threads // target.warp)
    slots = target.threads_per_processor // target.warp
    allowed = {
        "registers": _by_registers(target, warps, registers),
        "shared memory": _by_shared(target, shared),
        "threads": 0 if threads > target.threads_per_block else slots // warps,
        "blocks": target.blocks_per_processor,
    }
    blocks = min(allowed.values())
    return Occupancy(blocks, blocks * warps / slots, tuple(name for name, most in allowed.items() if most == blocks))


def _by_registers(target: Target, warps: int, registers: int) -> int:
    per_warp = _rounded(registers * target.warp, target.register_unit)
    if per_warp == 0:
        return target.blocks_per_processor
    per_partition = target.registers_per_processor // target.partitions // per_warp
    fits = per_warp * _rounded(warps, target.partitions) <= target.registers_per_processor
    if registers > target.registers_per_thread or not fits:  # a block is checked as if spread over all partitions
        return 0
    return per_partition * target.partitions // warps


def _by_shared(target: Target, shared: int) -> int:
    taken = _rounded(shared + target.shared_reserved, target.shared_unit)
    if shared > target.shared_per_block:
        return 0
    return target.shared_per_processor // taken if taken else target.blocks_per_processor


def _rounded(value: int, unit: int) -> int:
    return -(-value // unit) * unit
