"""What offline training says of its scores before the first step: from whom they are, and how stale."""

from tsdkd.artifacts.manifest import ModelRecord
from tsdkd.stages.data.offline import OfflineSource
from tsdkd.stages.data.provenance import Provenance, report_lines
from tsdkd.stages.models.load import LanguageModel
from tsdkd.stages.observer import Observer


def report_provenance(source: OfflineSource, record: ModelRecord, student: LanguageModel, observer: Observer) -> None:
    """Report the provenance of rollouts and scores; a warning names each condition that is not met.

    The student reads responses only if its weights are not those of the scored student.
    """
    provenance = Provenance(record, source.rollouts.manifest, source.scores.manifest)
    staleness = None if provenance.has_same_weights else source.measure_staleness(student)
    met, unmet = report_lines(provenance.facts(staleness))
    if met:
        observer.info(met)
    if unmet:
        observer.warning(unmet)
