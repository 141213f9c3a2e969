"""The rank of this process and the world size, as torchrun and `accelerate launch` set them; one process is rank 0."""

import os


def rank() -> int:
    return int(os.environ.get("RANK") or 0)


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE") or 1)
