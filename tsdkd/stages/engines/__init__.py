"""The engines that sample responses, and the engine check."""
