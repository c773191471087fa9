"""Flows say in which order things happen: the Prefect flows and the command line. They import tasks and models."""
