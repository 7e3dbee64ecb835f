"""Backend ``example``: the descriptor, which imports no torch."""

from moebench.contracts import Descriptor

DESCRIPTOR = Descriptor("backend", "example", "every expert on every token", "moebench_example.backend:create")
