"""One run of training: trainer, live rollouts, adapters, health, the finished checkpoint."""
