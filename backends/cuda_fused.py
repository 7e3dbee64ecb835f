"""``cuda_fused``: our CUDA kernels of a whole layer, from sorted assignments to outputs, in one launch or in two.

On a CUDA device they are compiled by NVRTC when a layer is loaded, and launched by the driver. For tensors of the CPU
the same source runs there, thread by thread (``kernels/cuda/shim``): that says whether it is right, never how fast.
What is verified of the kernels, and how, is in docs/gpu-kernels.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Protocol

from ..contracts import Availability, Evidence, Execution, LayerSpec, Refusal
from ..kernels import devices
from ..kernels.cuda import driver, host, nvrtc
from ..kernels.cuda.layer import ACTIVATIONS, DTYPES, ONLY, SIGNATURES, SOURCE, Launch, Sizes, Tiles, launches
from . import rules
from .plugins import CudaFused as Params
from .session import DenseWeights, Session, SortedExecutor, open_session

if TYPE_CHECKING:
    from torch import Tensor

    from ..moe.experts import ExpertStore

BLOCKS_PER_PROCESSOR = 2
"""Blocks of the persistent kernel for each multiprocessor: what its registers and shared memory allow at least."""


class Launcher(Protocol):
    """Where kernels run: ``blocks`` is how many the persistent one has there, ``told`` how the path is told."""

    blocks: int
    told: str

    def launch(self, one: Launch) -> None:
        """Run one kernel, or put it on the current stream."""


class HostLauncher:
    """The host shim, and what it counted so far."""

    blocks = 4

    def __init__(self, tiles: Tiles) -> None:
        self.shim, self.report = host.shim(tiles), host.Report()
        self.told = f"on the CPU by the host shim ({self.shim.told})"

    def launch(self, one: Launch) -> None:
        """Run a kernel to its end."""
        self.shim.launch([one], host.Schedule(late=False, multiprocessors=self.blocks), self.report)


class DeviceLauncher:
    """A CUDA device and the kernels of one dtype; ``cuda`` stands for its driver."""

    def __init__(self, cuda: driver.CudaDriver, tiles: Tiles, dtype: str) -> None:
        import torch

        arch = cuda.arch()
        code = nvrtc.compile_source(nvrtc.Source.read(SOURCE, (*tiles.options, ONLY[dtype])), arch)
        mine = {name: types for name, types in SIGNATURES.items() if name.endswith(f"_{dtype}")}
        self.module = driver.Module(cuda, code, mine)
        self.blocks = BLOCKS_PER_PROCESSOR * torch.cuda.get_device_properties().multi_processor_count
        self.told = f"by NVRTC for {arch} ({' '.join(tiles.options)})"

    def launch(self, one: Launch) -> None:
        """Put a kernel on the current stream."""
        self.module.launch(one.kernel, (one.blocks, 1, 1), (one.threads, 1, 1), one.shared_bytes, one.arguments)


def launcher_on(tiles: Tiles, dtype: str, device: str) -> Launcher:
    """Return what launches kernels on tensors of a device: for those of the CPU the host shim, GPU or not."""
    return HostLauncher(tiles) if device == "cpu" else DeviceLauncher(driver.CudaDriver(), tiles, dtype)


class Workspace:
    """What the kernels write beside the output, for calls of one size; counters are zero between calls."""

    def __init__(self, sizes: Sizes, tiles: Tiles, x_TH: Tensor, atomic: bool) -> None:
        import torch

        make = partial(torch.empty, device=x_TH.device)
        zeros = partial(torch.zeros, device=x_TH.device)
        rows = sizes.tokens if atomic else sizes.assignments
        self.buffers = (
            make(sizes.assignments, sizes.width, dtype=x_TH.dtype),
            (zeros if atomic else make)(rows, sizes.hidden, dtype=torch.float32),
            make(sizes.assignments, dtype=torch.int32),
            make(sizes.tokens, 2, dtype=torch.int32),
            zeros(sizes.state_numbers(tiles), dtype=torch.int32),
            zeros(sizes.slots(tiles), dtype=torch.int64),
        )


class CudaFusedExecutor(SortedExecutor):
    """One layer: its weights, the launches of a call, and the workspace of the last call's sizes."""

    def __init__(
        self, store: ExpertStore, spec: LayerSpec, params: Params, launchers: Callable[[str], Launcher], tiles: Tiles
    ) -> None:
        super().__init__(store, spec)
        self.weights = DenseWeights(store, spec)
        self.gate_up, self.down = (weight.detach().contiguous() for weight in (self.weights.gate_up, self.weights.down))
        self.params, self.tiles = params, tiles
        self.launcher = launchers(self.down.device.type)
        self.atomic = params.combine == "atomic"
        self.workspace: tuple[Sizes, Workspace] | None = None
        names = dict.fromkeys(
            one.kernel for one in self._launches(Sizes(1, spec.experts, spec.hidden, spec.width, 1), ())
        )
        self.kernels = tuple(f"{name} {self.launcher.told}" for name in names)

    def add_sorted(self, y_TH: Tensor, x_TH: Tensor, token_N: Tensor, offsets_E1: Tensor, weight_N: Tensor) -> None:
        """Write the layer's output over the zeros of ``y_TH``; no size is read back from the device."""
        if not len(x_TH) or not len(token_N):
            return
        x = x_TH.detach().contiguous()
        out = y_TH if y_TH.is_contiguous() else x.new_empty(x.shape)
        sizes = Sizes(len(x), self.spec.experts, self.spec.hidden, self.spec.width, len(token_N))
        if self.workspace is None or self.workspace[0] != sizes:
            self.workspace = sizes, Workspace(sizes, self.tiles, x, self.atomic)
        inputs = (token_N.contiguous(), offsets_E1.contiguous(), weight_N.detach().float().contiguous())
        numbers = (sizes.tokens, sizes.experts, sizes.hidden, sizes.width, ACTIVATIONS.index(self.spec.activation))
        flags = (int(self.spec.gated), int(self.atomic))
        arguments = (x, self.gate_up, self.down, *inputs, *self.workspace[1].buffers, out, *numbers, *flags)
        for one in self._launches(sizes, arguments):
            self.launcher.launch(one)
        if out is not y_TH:
            y_TH.copy_(out)

    def _launches(self, sizes: Sizes, arguments: Sequence[Any]) -> list[Launch]:
        variant = self.params.variant
        return launches(variant, self.spec.dtype, self.tiles, sizes, tuple(arguments), self.launcher.blocks)

    def events(self) -> Iterator[Mapping[str, Any]]:
        """Yield what the host shim counted since its layers were loaded; a device counts nothing."""
        if isinstance(self.launcher, HostLauncher):
            yield {"event": "host_shim", **{name: getattr(self.launcher.report, name) for name in host.COUNTED}}

    def resident_bytes(self) -> int:
        """Return the bytes of the weights."""
        return self.weights.nbytes


class CudaFused:
    """The backend."""

    def __init__(self, params: Params) -> None:
        self.params = params

    def availability(self) -> Availability:
        """Say where the kernels run: on a CUDA device, or on the CPU through the host shim, which times nothing."""
        absent = devices.missing("CUDA")
        if not absent:
            reason = nvrtc.missing()
            return Availability(not reason, reason, ("cuda",), (Evidence.MEASURED_GPU,))
        reason = host.missing()
        if reason:
            return Availability(False, f"{absent}; {reason}")
        return Availability(True, absent, ("cpu",), (Evidence.HOST_EXECUTED, Evidence.STATIC_COMPILE))

    def supports(self, spec: LayerSpec) -> Execution | Refusal:
        """Take layers of FFN experts of any size in bfloat16 or float16, forward only."""
        refused = rules.refusal(spec, "cuda_fused", DTYPES)
        if refused is None and spec.sparsity is not None and spec.sparsity.sites:
            refused = Refusal("cuda_fused leaves out no channels; use the eager backend")
        return refused or rules.execution(spec, ("topk", "sorted"))

    def load(self, layers: Mapping[int, ExpertStore], specs: Mapping[int, LayerSpec]) -> Session:
        """Load layers: compile the kernels where the cache does not have them; weights are used where they lie."""
        tiles, once = Tiles(), cache(launcher_on)

        def make(store: ExpertStore, spec: LayerSpec) -> CudaFusedExecutor:
            return CudaFusedExecutor(store, spec, self.params, partial(once, tiles, spec.dtype), tiles)

        return open_session(make, layers, specs, f"combine {self.params.combine}")
