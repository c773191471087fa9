"""The settings of each command, declared once: flag, help, validation and place in Prefect's form."""
