"""tsdkd generate: prompts to rollouts."""
