"""Model ``gguf``: a GGUF file of the user's. Imports no torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..contracts import Descriptor, MoebenchError, Scheme
from ..moe.blocks.gguf_file import GgufFile
from ..moe.blocks.gguf_types import open_file
from ..moe.shapes import ModelShape
from .models import cache_dir


@dataclass(frozen=True)
class GgufModel:
    """A GGUF file ``path``: architectures llama (with experts: Mixtral), qwen2, qwen3, qwen2moe, qwen3moe and olmoe.

    Any block type that the package gguf decodes is read, K-quants and IQ among them. With `axes.quantization=file`
    experts are run from the very bytes of the file; any other begins with what they decode to. With a tokenizer in the
    file it can be judged on text. Nothing in a file is ever run. A dense model needs a structure, such as ``split``.
    """

    path: str = ""

    @property
    def recorded(self) -> bool:
        """Whether text can be given to the whole model: all of it can be carried over, and a tokenizer is there."""
        from .models.gguf_config import TOKENIZER, check_whole

        if importlib.util.find_spec("transformers") is None:
            return False
        try:
            check_whole(self._file())
            return TOKENIZER in self._file().metadata
        except MoebenchError:
            return False

    def shape(self) -> ModelShape:
        """Return the sizes that metadata and tensors agree upon."""
        from .models.gguf_config import read_shape

        return read_shape(self._file())

    def weights_sha256(self) -> str:
        """Return the sha256 of the file, which is read for it once per process."""
        from .models.hf_config import file_sha256

        file = self.file()
        stat = file.stat()
        return file_sha256(file, stat.st_size, stat.st_mtime_ns)

    def base(self) -> str:
        """Return the types of the FFNs' matrices, such as ``Q4_K+Q6_K``."""
        from .models.gguf_stored import types_of

        return "+".join(sorted({name for name, _, _ in types_of(self._file(), self.shape().moe_layers)}))

    def stored_scheme(self, layers: Sequence[int], width: int) -> Scheme:
        """Return how the file stores the FFNs of ``layers`` cut into experts of ``width``; ValueError where it cannot.

        Its bits are the true ones where matrices are of several types; of one type its name says them.
        """
        from .models.gguf_stored import stored_scheme

        return stored_scheme(self._file(), layers, width)

    def missing(self) -> str | None:
        """Return a sentence where the file is not there, or is none that can be read."""
        if importlib.util.find_spec("gguf") is None:
            return "model 'gguf' needs gguf; run pip install 'moebench[models]'."
        try:
            self.shape()
            self.base()
        except MoebenchError as error:
            return str(error)
        return None

    def file(self) -> Path:
        """Return the file; MoebenchError where none is named."""
        if not self.path:
            raise MoebenchError("model 'gguf' needs a file; add model.path=FILE.gguf.")
        return Path(self.path).expanduser().absolute()

    def home(self) -> Path:
        """Return where the cache keeps what is made of the model."""
        return cache_dir() / "models" / "gguf" / self.weights_sha256()[:16]

    def _file(self) -> GgufFile:
        return open_file(self.file())


DESCRIPTORS = [
    Descriptor(
        "model",
        "gguf",
        "a GGUF file, its blocks as they are with quantization=file",
        "moebench.suites.models.gguf_model:build",
        GgufModel,
        requires=("gguf",),
    ),
]
