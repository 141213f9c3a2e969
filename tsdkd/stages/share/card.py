"""The card of an artifact on the hub: what it is, what it was made from, and how to pull it."""

from pathlib import PurePath

from huggingface_hub import DatasetCardData, RepoCard

from tsdkd.artifacts.manifest import HUB_DATASET, Manifest
from tsdkd.printable import escape_markdown

CARD_FILE = "README.md"


def artifact_card(manifest: Manifest, url: str, older: str = "") -> str:
    """README.md of an artifact without a card of its own. Names models and parents, but no paths.

    `older`: the card that it replaces, whose front matter stays.
    """
    front = RepoCard(older, ignore_metadata_errors=True).data if older else DatasetCardData()
    front["tags"] = sorted({*(front.get("tags") or ()), "tsdkd", "distillation", manifest.kind})
    models = [(model.role, _public_name(model.name), model.weights) for model in manifest.models]
    parents = [
        (parent.kind, parent.path if parent.kind == HUB_DATASET else "", parent.fingerprint)
        for parent in manifest.parents
    ]
    rows = [
        f"| {escape_markdown(kind)} | {escape_markdown(name)} | {digest[:16]} |"
        for kind, name, digest in (*models, *parents)
    ]
    size = sum(part.bytes for part in manifest.parts) / 1e6
    return "\n".join(
        [
            "---",
            front.to_yaml(),
            "---",
            "",
            f"# {manifest.kind.capitalize()} of tsdkd {escape_markdown(manifest.tsdkd)}",
            "",
            f"Rows: {manifest.rows:,}. Files: {len(manifest.parts):,}, {size:,.1f} MB.",
            f"Fingerprint: {manifest.fingerprint[:16]}.",
            "",
            "```bash",
            f"tsdkd artifact pull {url} runs/pulled/{manifest.kind}",
            "```",
            "",
            "## Made from",
            "",
            "| role | name | fingerprint |",
            "| --- | --- | --- |",
            *rows,
            "",
        ]
    )


def _public_name(name: str) -> str:
    """The name of a model of the hub; of a model in a directory, the directory's name alone."""
    return name if name.count("/") <= 1 and not name.startswith(("/", ".", "~")) else PurePath(name).name
