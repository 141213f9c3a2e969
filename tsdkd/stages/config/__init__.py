"""Configurations of the stages and their options; loads without torch, typer and yaml."""
