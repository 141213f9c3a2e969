"""Models: names and files, specs and sizes, loading, adapters, distributed training, and the embedded teacher."""

import os

os.environ["USE_HUB_KERNELS"] = "NO"  # transformers would run kernels of the hub, which are code, where it can
