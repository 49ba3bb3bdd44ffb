"""Configs worth keeping: runs promoted to a file in `config/sota/`, and checked ever after."""
