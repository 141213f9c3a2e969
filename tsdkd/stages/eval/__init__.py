"""tsdkd eval: benchmarks through lm-eval, and the divergence from the teacher on held-out responses."""
