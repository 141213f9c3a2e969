"""Model names: a path that is not a complete model is refused."""

import shutil
from pathlib import Path

import pytest

from tsdkd.artifacts.files import MANIFEST_FILE
from tsdkd.artifacts.manifest import Manifest
from tsdkd.artifacts.writer import Writer
from tsdkd.errors import ArtifactError, InputError
from tsdkd.stages.models.paths import model_directory


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "nowhere", "a/b/c"])
def test_a_missing_path_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"The model directory {name} does not exist"):
        model_directory(name)


def test_a_name_with_a_zero_byte_is_refused() -> None:
    with pytest.raises(InputError, match="zero byte"):
        model_directory("a\0b")


def test_a_directory_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"it has no config\.json"):
        model_directory(str(tmp_path))


def test_an_unfinished_checkpoint_is_refused(student: Path, tmp_path: Path) -> None:
    partial = tmp_path / "partial"
    shutil.copytree(student, partial)
    manifest = Manifest(kind="checkpoint", config={}, seed=0)
    with Writer.open(tmp_path / "m", manifest) as writer:
        shutil.copy(writer.path / MANIFEST_FILE, partial / MANIFEST_FILE)
    with pytest.raises(ArtifactError, match="not finished"):
        model_directory(str(partial))
