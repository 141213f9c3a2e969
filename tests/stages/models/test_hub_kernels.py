"""bitsandbytes neither loads a kernel of the hub nor warns that it cannot; other users of `kernels` are unaffected."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tsdkd.stages.models.hub_kernels import IMPORTER

GET_KERNEL = """
from pathlib import Path

def get_kernel(*_, **__):
    Path(__file__).with_name("asked").touch()
    raise RuntimeError("no network")
"""
ASKING = """
import logging

try:
    from kernels import get_kernel
    get_kernel("kernels-community/quantization-bitsandbytes", version=1)
except Exception as error:
    logging.getLogger(__name__).warning("No kernel: %s", error)
"""
"""What bitsandbytes does on a CPU with AVX512_BF16."""
KERNELS = {"kernels/__init__.py": GET_KERNEL}
FAKE = {"bitsandbytes/__init__.py": "", "bitsandbytes/backends/cpu/ops.py": ASKING}
IMPORTS = """
import logging
import tsdkd.stages.models
import bitsandbytes.backends.cpu.ops
logging.getLogger("bitsandbytes.backends.cpu.ops").warning("a later message")
"""
USES = """
import kernels
kernels.get_kernel
"""


@pytest.mark.parametrize(
    ("code", "files"),
    [
        pytest.param(IMPORTS, FAKE, id="no kernels"),
        pytest.param(IMPORTS + USES, FAKE | KERNELS, id="kernels"),
        pytest.param(USES + IMPORTS + USES, FAKE | KERNELS, id="imported kernels"),
    ],
)
def test_bitsandbytes_asks_for_no_kernel(code: str, files: dict[str, str], tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "a later message\n"
    assert not (tmp_path / "kernels" / "asked").exists()


def test_no_other_module_of_bitsandbytes_asks() -> None:
    """Except for tensors on GPUs of Apple, where tsdkd has none."""
    package = find_spec("bitsandbytes")
    if package is None:
        pytest.skip("needs `pip install bitsandbytes`")
    root = Path(str(package.origin)).parent
    asking = {
        ".".join(path.relative_to(root.parent).with_suffix("").parts)
        for path in root.rglob("*.py")
        if re.search("^ *(from|import) kernels", path.read_text(), re.MULTILINE)
    }
    assert asking == {IMPORTER, "bitsandbytes.backends.mps.ops"}
