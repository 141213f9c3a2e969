"""Models: names and files, specs and sizes, loading, adapters, distributed training, and the embedded teacher."""

import logging
import os

os.environ["USE_HUB_KERNELS"] = "NO"  # kernels of the hub are custom code, which transformers would run
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a missing kernel that is not used here
