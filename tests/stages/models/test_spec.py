"""Specs: they have the properties of the loaded model, and name an unreadable config."""

import shutil
from pathlib import Path

import pytest

from tsdkd.errors import InputError
from tsdkd.stages.models.config_files import GENERATION_CONFIG
from tsdkd.stages.models.load import load_model
from tsdkd.stages.models.spec import load_config, load_spec


def test_a_spec_has_the_properties_of_the_loaded_model(student: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(student, bare, ignore=shutil.ignore_patterns(GENERATION_CONFIG))
    for path in (student, bare):
        spec, loaded = load_spec(str(path)), load_model(str(path))
        assert (spec.directory, spec.adapter) == (path, None)
        assert (spec.end_ids, spec.context) == (loaded.end_ids, loaded.context)
        assert f"torch.{spec.dtype}" == str(loaded.model.dtype)
        assert load_config(str(path)).hidden_size == loaded.model.config.hidden_size


@pytest.mark.parametrize("family", ["rwkv", "recurrent_gemma"])
def test_a_model_that_reads_padding_is_refused(student: Path, tmp_path: Path, family: str) -> None:
    """Its responses would depend on the prompts beside them."""
    shutil.copytree(student, tmp_path / family)
    (tmp_path / family / "config.json").write_text(f'{{"model_type": "{family}"}}')
    for load in (load_spec, load_model):
        with pytest.raises(InputError, match="reads padding"):
            load(str(tmp_path / family))


def test_a_model_that_is_not_causal_is_refused(student: Path, tmp_path: Path) -> None:
    shutil.copytree(student, tmp_path / "t5")
    (tmp_path / "t5" / "config.json").write_text('{"model_type": "t5"}')
    for load in (load_spec, load_model):
        with pytest.raises(InputError, match="is a t5 model, which is not a causal language model"):
            load(str(tmp_path / "t5"))


def test_an_unreadable_config_is_named(student: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(student, broken)
    (broken / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(InputError, match="has a config that transformers cannot read"):
        load_config(str(broken))


@pytest.mark.parametrize("content", ["{oops", "[]", '"text"'])
def test_an_unreadable_generation_config_is_named(student: Path, tmp_path: Path, content: str) -> None:
    shutil.copytree(student, tmp_path / "broken")
    (tmp_path / "broken" / GENERATION_CONFIG).write_text(content)
    with pytest.raises(InputError, match="has a config that transformers cannot read") as caught:
        load_spec(str(tmp_path / "broken"))
    assert GENERATION_CONFIG in caught.value.remedy
