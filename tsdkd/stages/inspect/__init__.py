"""`tsdkd inspect`: which tokens of a response are selected, and what both models predict there."""
