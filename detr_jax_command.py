"""The installed `detr-jax`. It stands beside the package, because importing that takes seconds."""

import sys

COMMANDS = {
    "detect": "draw the objects in photographs",
    "evaluate": "measure average precision, dense or with a plan",
    "train-gates": "make a detector sparse: train gates and write its plan",
    "search-plan": "search the fastest or sparsest plan within a budget",
    "convert": "write a published checkpoint as one safetensors file",
    "export": "write a detector as StableHLO or ONNX, to serve it without this library",
    "train-detector": "fine-tune a detector on own classes, or train the embedded one from scratch",
}


def main() -> None:
    """Runs the subcommand that the command line names; without one, lists them."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        listing = "\n".join(f"  {name:<16}{does}" for name, does in COMMANDS.items())
        print(f"usage: detr-jax COMMAND [OPTIONS]\n\n{listing}\n\n`detr-jax COMMAND --help` explains its options.")
    elif name in COMMANDS:
        from detr_jax.commands import cli

        sys.argv[:2] = [f"detr-jax {name}"]
        cli.run_command(name.replace("-", "_"))
    else:
        print(f"error: there is no command {name!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
