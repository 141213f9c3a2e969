"""Models: names and files, specs and sizes, loading, adapters, distributed training, and the embedded teacher."""
