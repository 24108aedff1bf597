"""Runs `detr-jax export`."""

from detr_jax.commands import cli

if __name__ == "__main__":
    cli.run_command("export")
