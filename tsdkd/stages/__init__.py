"""The stages: each reads artifacts and writes one. They never print, never exit, and never import each other.

They refuse artifacts whose recorded configuration has other types than the configuration of their stage.
"""

from collections.abc import Mapping
from typing import Any

from tsdkd.artifacts.manifest import CONFIG_CHECKS


def _check_config(kind: str, config: Mapping[str, Any]) -> None:
    from tsdkd.stages.config.recorded import check_config

    check_config(kind, config)


CONFIG_CHECKS.append(_check_config)
