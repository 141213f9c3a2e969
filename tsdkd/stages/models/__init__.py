"""Models: names and files, specs and sizes, loading, adapters, distributed training, and the embedded teacher."""

from tsdkd.stages.models.hub_kernels import refuse_hub_kernels

refuse_hub_kernels()
