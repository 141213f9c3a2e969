"""The Triton kernel without a GPU: in Triton's interpreter it equals the plain path, and it compiles for GPUs."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def test_the_kernel_equals_the_plain_path() -> None:
    """Every divergence, soft-caps, temperatures and the policy gradient; bfloat16 within its rounding."""
    finished = subprocess.run(
        [sys.executable, "-m", "tests.helpers.triton_interpreter"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    differences = json.loads(finished.stdout.splitlines()[-1])
    assert differences["torch.float32"] < 1e-5
    assert differences["torch.bfloat16"] < 0.01


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kind", range(5))
def test_the_kernel_compiles_for_gpus_without_spilling(
    capability: int, kind: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A100 and H100, in the types and sizes that training uses."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tsdkd.core import triton_kernel

    constants = {"kind": kind, "student_capped": True, "teacher_capped": True, "vocab_block": triton_kernel.VOCAB_BLOCK}
    whole = {"tokens", "vocab", "student_columns", "teacher_columns", "student_stride", "teacher_stride"}
    pointers = {"student_and_grad": "*bf16", "teacher": "*bf16", "results": "*fp32"}
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "i32" if name in whole else "fp32")
        for name in triton_kernel._compare.arg_names
    }
    kernel = triton.compile(
        ASTSource(triton_kernel._compare, signature=signature, constexprs=constants),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": triton_kernel.WARPS},
    )
    assert f".target sm_{capability}" in kernel.asm["ptx"]
    (tmp_path / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    used = subprocess.run(
        [tool, "--dump-resource-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True
    ).stdout
    assert "LOCAL:0" in used
    assert "STACK:0" in used  # registers suffice
