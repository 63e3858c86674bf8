"""Run configuration: frozen dataclasses, one section a stage, checked when they are made."""
