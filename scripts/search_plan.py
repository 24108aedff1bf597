from detr_jax.commands import cli
from detr_jax.commands.search_plan import Arguments, main

if __name__ == "__main__":
    cli.run(main, Arguments)
