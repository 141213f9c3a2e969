"""The methods of the bench: the options of `tsdkd train` for each."""

from recipes.experiment.entries import (
    COMPLEMENT,
    GKD,
    MILD,
    NO_ENTROPY,
    NO_RANKING,
    TSDKD,
    Entry,
    file_entry,
)
from tsdkd.errors import InputError
from tsdkd.stages.methods import METHODS

ENTRIES = {
    entry.name: entry
    for entry in (
        GKD,
        Entry("gkd-0.5", "gkd", "--beta 0.5"),
        *(TSDKD, MILD, NO_ENTROPY, NO_RANKING, COMPLEMENT),
        *(Entry(name, name) for name in METHODS if name not in {"gkd", "tsdkd", "tsdkd-complement"}),
    )
}


def choose_entries(names: str) -> list[Entry]:
    """GKD and the named entries, or all for "". A name is that of an entry, a method or a method's file.

    Raises InputError for an unknown name and for two files of one name.
    """
    chosen = {GKD.name: GKD}
    for word in names.split() or ENTRIES:
        entry = ENTRIES.get(word) or file_entry(word)
        if chosen.setdefault(entry.name, entry) != entry:
            raise InputError(f"Two methods are named {entry.name}.", "Rename one of the files.")
    return list(chosen.values())
