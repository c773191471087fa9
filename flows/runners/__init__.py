"""Slots on other machines: on a Ray or Dask cluster, or as flow runs of a work pool. Each engine has its own file."""
