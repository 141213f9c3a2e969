"""The identity of an artifact compared with that of a run: what differs, in words."""

import json
from collections.abc import Collection
from typing import Any

from tsdkd.artifacts.manifest import Manifest

HASHED = ["weights", "tokenizer", "chat template"]
"""What the hashes of a model in an identity stand for, in their order."""
CHAT_FORMAT = ("config.chat.", "parent chat-template.")
"""How keys of the chat format begin, with a dot at their ends. The format decides the chat templates of models."""


def describe_differences(existing: Manifest, wanted: Manifest, may_differ: Collection[str] = ()) -> list[str]:
    """The differences between two identities, in words; also between versions if this run would add parts."""
    before, after = _identity_as_json(existing), _identity_as_json(wanted)
    switched = _switched_groups(before, after, "on", "off") | _switched_groups(after, before, "off", "on")
    for identity in (before, after):
        for key in [key for key in identity if key.startswith(tuple(f"{group}." for group in switched))]:
            del identity[key]
    differing = [f"{key} was {was}, now {now}" for key, (was, now) in sorted(switched.items())]
    keys = sorted((before.keys() | after.keys()) - {*may_differ})
    changed = [key for key in keys if before.get(key) != after.get(key)]
    has_other_format = any(f"{key}.".startswith(CHAT_FORMAT) for key in (*changed, *switched))
    for key in changed:
        was, now = before.get(key), after.get(key)
        if isinstance(was, list) and isinstance(now, list) and key.startswith("model "):
            names = [name for name, one, other in zip(HASHED, was, now, strict=True) if one != other]
            if names != HASHED[-1:] or not has_other_format:
                differing.append(f"{key} was another: different {' and '.join(names)}")
        else:
            differing.append(f"{key} was {_abbreviated(was)}, now {_abbreviated(now)}")
    versions = [{"tsdkd": manifest.tsdkd, **manifest.libraries} for manifest in (existing, wanted)]
    adds_parts = existing.state == "partial" or differ_in(existing, wanted, may_differ)
    if adds_parts and versions[0] != versions[1]:
        differing.append(f"versions were {versions[0]}, now {versions[1]}")
    return differing


def _switched_groups(without: dict[str, Any], other: dict[str, Any], now: str, was: str) -> dict[str, tuple[str, str]]:
    """Groups of settings that are None in `without` and present in `other`, each with `was` and `now`."""
    groups = {key for key, value in without.items() if value is None}
    return {key: (was, now) for key in groups if any(name.startswith(f"{key}.") for name in other)}


def differ_in(existing: Manifest, wanted: Manifest, keys: Collection[str]) -> bool:
    """Whether two identities differ in one of these fields."""
    before, after = _identity_as_json(existing), _identity_as_json(wanted)
    return any(before.get(key) != after.get(key) for key in keys)


def _identity_as_json(manifest: Manifest) -> dict[str, Any]:
    """The identity with the types that JSON returns."""
    identity: dict[str, Any] = json.loads(json.dumps(manifest.identity))
    return identity


def _abbreviated(value: Any) -> str:
    def short(item: Any) -> Any:
        return f"{item[:12]}…" if isinstance(item, str) and len(item) == 64 else item

    return str([short(item) for item in value] if isinstance(value, list) else short(value))
