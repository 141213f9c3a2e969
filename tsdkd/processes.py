"""What torchrun and `accelerate launch` set: the rank of this process, the world size, FSDP. One process is rank 0."""

import os


def rank() -> int:
    return int(os.environ.get("RANK") or 0)


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE") or 1)


def shards_weights() -> bool:
    """Whether `accelerate launch` asks for FSDP."""
    from accelerate.utils import parse_flag_from_env  # takes seconds

    return bool(parse_flag_from_env("ACCELERATE_USE_FSDP"))
