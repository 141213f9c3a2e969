"""tsdkd score: rollouts to scores."""
