"""The memory of online training's teacher."""

import gc
import weakref
from pathlib import Path

from tsdkd.stages.data.online_teachers import LoadedTeacher
from tsdkd.stages.data.source import join_samples
from tsdkd.stages.models.load import load_model


def test_a_teacher_that_has_read_is_freed_with_its_run(teacher: Path) -> None:
    model = load_model(str(teacher))
    reader, living = LoadedTeacher(model), weakref.ref(model.model)
    assert len(reader.signal(join_samples([{"prompt_ids": [1, 2], "response_ids": [3, 4]}], packed=True))) == 2
    del model, reader
    gc.collect()
    assert living() is None
