"""The settings of torchrun and `accelerate launch`: rank, world size, FSDP. Without a launcher, the rank is 0."""

import os


def rank() -> int:
    return int(os.environ.get("RANK") or 0)


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE") or 1)


def shards_weights() -> bool:
    """Whether `accelerate launch` asks for FSDP."""
    from accelerate.utils import parse_flag_from_env  # takes seconds

    return bool(parse_flag_from_env("ACCELERATE_USE_FSDP"))


def local_rank() -> int:
    """The rank among the processes of this machine, which is also the number of this process's GPU."""
    return int(os.environ.get("LOCAL_RANK") or 0)


def local_world_size() -> int:
    """The number of processes of this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
