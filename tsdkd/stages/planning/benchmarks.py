"""How long the benchmarks are, for an estimate of time before any of them is loaded."""

LENGTHS: dict[str, tuple[int, int]] = {
    "embedded": (360, 60),
}
"""Documents, and tokens read for one."""
