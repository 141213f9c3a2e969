"""Kernels of the hub are custom code: neither transformers nor bitsandbytes loads one.

bitsandbytes asks for a kernel of the hub while it is imported, on CPUs with AVX512_BF16: it downloads and runs the
kernel if the package `kernels` is installed, and else warns that it is not. peft imports bitsandbytes for every
adapter. The kernel is for packed weights, which tsdkd does not use.
"""

import logging
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import spec_from_file_location
from types import ModuleType

IMPORTER = "bitsandbytes.backends.cpu.ops"
"""The module that asks for the kernel."""


def refuse_hub_kernels() -> None:
    """Call it before transformers and bitsandbytes are imported. Other users of `kernels` are unaffected."""
    os.environ["USE_HUB_KERNELS"] = "NO"  # read by transformers
    sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name == IMPORTER else None
        return spec and spec_from_file_location(name, loader=_Loader(name, str(spec.origin)))


class _Loader(SourceFileLoader):
    """Runs a module that finds no package `kernels`, and logs nothing meanwhile."""

    def exec_module(self, module: ModuleType) -> None:
        logger, kernels = logging.getLogger(module.__name__), sys.modules.get("kernels")
        disabled = logger.disabled
        logger.disabled, sys.modules["kernels"] = True, None  # type: ignore[assignment]  # its import fails
        try:
            super().exec_module(module)
        finally:
            logger.disabled = disabled
            del sys.modules["kernels"]
            if kernels:
                sys.modules["kernels"] = kernels
