"""Time and memory of `tsdkd artifact push` and `pull`: a directory, and S3 by moto's server on loopback.

    python benchmarks/share.py --parts 4 --megabytes 200

Parts hold random bytes. Memory is the peak of the command's process; the first line of each store is an artifact of
1 kB, so the difference is what the parts cost. moto keeps objects in its own process.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from tsdkd.artifacts.manifest import Manifest, ModelRecord
from tsdkd.artifacts.writer import Writer
from tsdkd.stages.config.eval import EvalConfig

SERVER = """
import sys, time, boto3
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
url = "http://%s:%d" % server.get_host_and_port()
boto3.client("s3", endpoint_url=url, region_name="us-east-1").create_bucket(Bucket="bucket")
print(url, flush=True)
time.sleep(10**6)
"""


def write_artifact(path: Path, parts: int, size: int) -> Path:
    model = ModelRecord("evaluated", "models/small", "a" * 64, "t", "c")
    with Writer.open(path, Manifest("results", asdict(EvalConfig(tasks=("gsm8k",))), 0, (), (model,))) as writer:
        for number in range(parts):
            with writer.temporary_path(f"part-{number}.bin").open("wb") as file:
                for start in range(0, size, 1 << 20):
                    file.write(os.urandom(min(1 << 20, size - start)))
            writer.add_file(f"part-{number}.bin")
        writer.finish({})
    return path


def measure(*command: str) -> tuple[float, float]:
    """Seconds and peak MB of a command of tsdkd."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "tsdkd", "artifact", *command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, command
    return time.monotonic() - start, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--megabytes", type=int, default=200, help="of each part")
    options = parser.parse_args()
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "key", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ.update(keys)
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    assert server.stdout
    os.environ["AWS_ENDPOINT_URL"] = server.stdout.readline().strip()
    try:
        with tempfile.TemporaryDirectory() as directory:
            folder = Path(directory)
            sizes = {
                "1 kB": (1, 1000),
                f"{options.parts} x {options.megabytes} MB": (options.parts, options.megabytes * 10**6),
            }
            print(f"{'store':8} {'artifact':>14} {'push, s':>8} {'MB':>6} {'pull, s':>8} {'MB':>6}")
            for store in (f"file://{folder}/there", "s3://bucket"):
                for number, (name, size) in enumerate(sizes.items()):
                    artifact = folder / f"artifact-{number}"
                    if not artifact.exists():
                        write_artifact(artifact, *size)
                    pushed = measure("push", str(artifact), f"{store}/{number}")
                    pulled = measure("pull", f"{store}/{number}", str(folder / f"back-{store[:4]}-{number}"))
                    numbers = f"{pushed[0]:8.1f} {pushed[1]:6.0f} {pulled[0]:8.1f} {pulled[1]:6.0f}"
                    print(f"{store.split(':')[0]:8} {name:>14} {numbers}")
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    main()
