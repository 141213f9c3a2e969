"""`tsdkd report`: one HTML page about one or several runs. Imports no torch."""
