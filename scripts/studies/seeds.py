"""Loss of AP with all FFNs sparse, on scenes on which nothing was chosen, with several seeds."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from common import Rows, Scorer, check_options, check_rows, embed, frozen, markdown_table

import detr_jax
from detr_jax.commands import cli
from detr_jax.files import replacing
from detr_jax.methods import MGS, PAPER_THRESHOLD, Experts, Method
from detr_jax.run_folder import finish_run, open_run
from detr_jax.training.budgets import Budget, Density, Recall, Threshold
from detr_jax.training.fit import FitOptions

ROWS: Mapping[str, tuple[Method, Budget, FitOptions]] = {
    "mgs-paper": (MGS(), Threshold(PAPER_THRESHOLD), FitOptions("own")),
    "mgs-0.99": (MGS(), Recall(0.99), FitOptions()),
    "experts-32-0.06": (Experts(experts=32), Density(0.06), FitOptions()),
    "experts-32-0.04": (Experts(experts=32), Density(0.04), FitOptions()),
    "experts-16-0.04": (Experts(experts=16), Density(0.04), FitOptions()),
}
"""Methods, budgets and options by the name of the plan's file."""
OUTPUTS = ("rows.json", "plans", "table.md")


@dataclass(frozen=True)
class Arguments:
    """Fits the methods of the README's table with several seeds, and measures AP on the test split of scenes.

    The plans are those of `scripts/train_gates.py`, which measures on the validation split. Writes a plan for each row
    and seed, results.json and table.md into the output folder. About 40 minutes on two CPU cores.
    """

    model: str = "detr-tiny"
    """Name of a detector of scenes, or path of a checkpoint."""
    data: str = "scenes"
    """scenes, or scenes:256 for those of 256 pixels a side."""
    rows: tuple[str, ...] = tuple(ROWS)
    """Rows to measure."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of gates, routers and the order of training images."""
    train: int = 4096
    """Training scenes."""
    statistics: int = 256
    """Of those, for the neuron order by co-activation and for statistics."""
    calib: int = 128
    """Held-out training scenes for the thresholds."""
    images: int = 2000
    """Test scenes."""
    batch_size: int = 8
    """Images per batch."""
    out: Path = Path("runs/seeds")
    """Folder for the results."""
    resume: bool = False
    """Resume an interrupted run in the output folder."""
    overwrite: bool = False
    """Delete an earlier run in the output folder."""


def main(arguments: Arguments) -> None:
    started = time.perf_counter()
    check_options(
        arguments, least=dict.fromkeys(("train", "statistics", "calib", "images", "batch_size"), 1) | {"seeds": 0}
    )
    check_rows(arguments.rows, ROWS)
    model = detr_jax.load(arguments.model)
    training = detr_jax.open_dataset(arguments.data, "train", arguments.train + arguments.calib)
    test = detr_jax.open_dataset(arguments.data, "test", arguments.images)
    with frozen(model) as fingerprint:
        settings = cli.settings(arguments, detector=fingerprint)
        open_run(arguments.out, settings, OUTPUTS, resume=arguments.resume, overwrite=arguments.overwrite)
        plans = arguments.out / "plans"
        plans.mkdir(exist_ok=True)
        rows = Rows(arguments.out / "rows.json")
        scorer = Scorer(model, test, embed(model, test, arguments.batch_size, "test"), 8)
        keys = {f"{name}-seed{seed}": (name, seed) for name in arguments.rows for seed in arguments.seeds}
        for key, (name, seed) in keys.items():
            if key in rows:
                continue
            print(f"{key}, {len(rows.by_key) + 1} of {len(keys)}")
            method, budget, options = ROWS[name]
            options = replace(options, statistics_images=arguments.statistics, batch_size=arguments.batch_size)
            sparse = detr_jax.sparsify(
                *(model, training, replace(method, seed=seed), budget), calibration=arguments.calib, options=options
            )
            detr_jax.save_plan(sparse.plan, plans / f"{key}.safetensors", overwrite=True)
            scores = scorer(sparse.detector, sparse.plan.selectors)
            rows.keep(key, {"row": name, "seed": seed} | scores)
    text = report(list(rows.by_key.values()))
    print(f"\nDense AP {scorer.dense_AP:.3f}, {len(test)} images of {test.name}\n\n{text}")
    with replacing(arguments.out / "table.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    results = {"rows": rows.by_key, "dense_AP": scorer.dense_AP, "data": test.name, "images": len(test)}
    finish_run(arguments.out, results | {"seconds": time.perf_counter() - started} | cli.provenance(arguments))
    print(f"\nplans, table.md and results.json are in {arguments.out}")


def report(rows: list[dict]) -> str:
    """A line for each method: density and points of AP against dense, of each seed, and the mean over the seeds."""
    seeds = sorted({row["seed"] for row in rows})
    lines = []
    for name in dict.fromkeys(row["row"] for row in rows):
        of_row = sorted((row for row in rows if row["row"] == name), key=lambda row: row["seed"])
        lost = [100 * row["AP_minus_dense"] for row in of_row]
        bounds = [100 * np.array(row["AP_minus_dense_interval"]) for row in of_row]
        points = [f"{one:+.2f} [{low:+.2f}, {high:+.2f}]" for one, (low, high) in zip(lost, bounds, strict=True)]
        density = np.mean([row["density"] for row in of_row])
        lines.append([name, f"{100 * density:.1f} %", *points, f"{np.mean(lost):+.2f}"])
    return markdown_table(["row", "kept", *(f"seed {seed}" for seed in seeds), "mean"], lines, 1)


if __name__ == "__main__":
    cli.run(main, Arguments)
