"""tsdkd inspect: token by token, which tokens are selected. Recorded scores are read without torch."""
