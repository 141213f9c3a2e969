"""tsdkd: distil a large language model's reasoning into a small one, on the tokens that matter (TSD-KD)."""

__version__ = "0.1.0"
