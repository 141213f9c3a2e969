"""`tsdkd inspect`: the selected tokens of a response, and the predictions of both models."""
