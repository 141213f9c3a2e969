"""The record of a served teacher in manifests: the model's name and the fingerprint of its answers, not its URL."""

from contextlib import suppress
from pathlib import Path

from tsdkd.artifacts.manifest import SERVED, ModelRecord, load_manifest
from tsdkd.artifacts.replacing import pending_path
from tsdkd.errors import ArtifactError
from tsdkd.stages.teacher_server.fingerprint import same_teacher
from tsdkd.stages.teacher_server.server import TeacherServer


def served_record(server: TeacherServer, student: ModelRecord, output: Path, role: str = "teacher") -> ModelRecord:
    """The teacher's record for an artifact: its recorded fingerprint where a run continues with the same teacher.

    The tokenizer is the student's, as the self-test found it.
    """
    for directory in (output, pending_path(output.resolve())):
        with suppress(ArtifactError):
            recorded = load_manifest(directory).model(role)
            ours = recorded.served and recorded.name == server.model
            if ours and same_teacher(recorded.weights, server.fingerprint):
                server.continue_as(recorded.weights)
    return ModelRecord(role, server.model, server.fingerprint, student.tokenizer, SERVED)
