"""Searches the plan that is fastest on this device, or sparsest, within a budget."""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

import detr_jax
from detr_jax import cli
from detr_jax.data.dataset import Dataset, Subset
from detr_jax.data.embedding import EmbeddedBatch, embedded_batches
from detr_jax.data.sources import open_dataset
from detr_jax.data.transforms import resized_size
from detr_jax.evaluation.comparison import Comparison, Row
from detr_jax.evaluation.ffn_times import measure_times
from detr_jax.evaluation.flops import dense_flops
from detr_jax.evaluation.frontier import OutputChange
from detr_jax.evaluation.report import table
from detr_jax.evaluation.search_plot import plot_search
from detr_jax.files import write_json
from detr_jax.kernels import Execution
from detr_jax.run_folder import RESULTS, open_run
from detr_jax.sparsity import Plan, save_plan
from detr_jax.sparsity.activations import ActivationStatistics
from detr_jax.sparsity.allocation import Choice, greedy, undominated
from detr_jax.sparsity.candidates import KINDS, Candidate, Material, candidates_of
from detr_jax.sparsity.ordering import cofiring_order, reorder
from detr_jax.sparsity.selectors import Pooled, sketch
from detr_jax.training.activations import measure_moments, profile_activations
from detr_jax.training.calibration import collect_scores
from detr_jax.training.passes import StoredPasses

OUTPUTS = ("plan.safetensors", "search.png", "activations.safetensors")
BUDGETS = ("density", "latency", "ap-loss")
LADDER = tuple(np.geomspace(0.9, 0.04, 28).tolist())
"""Shares of the dense FFNs' time that a bound on the loss of AP is searched among."""


@dataclass(frozen=True)
class Arguments:
    """Searches a plan: of every FFN whether it stays dense, computes a fixed set of neurons, or one that is chosen anew
    for each image or window, and how many.

    What each choice costs in accuracy is measured by the change of the detector's outputs, what it costs in time on
    this device, with the selector's own work. The budget is one of

    - ap-loss=0.5: the fastest plan that loses at most so many points of AP on held-out training images;
    - latency=0.4: the most accurate one whose FFNs take at most such a share of the dense ones' time;
    - density=0.2: the most accurate one that computes at most such a share of the hidden neurons.

    Without options: detr-tiny on generated scenes. Writes plan.safetensors, results.json and search.png into the output
    folder, with fixed sets alone beside the plan. `scripts/evaluate.py --plan` and `scripts/benchmark_plan.py` take it.
    """

    budget: str = "ap-loss=0.5"
    """ap-loss=POINTS, latency=SHARE or density=SHARE."""
    model: str = "detr-tiny"
    """Name of a detector or path of a checkpoint."""
    preset: str | None = None
    """Architecture of a checkpoint that does not say which it is, e.g. detr-r50."""
    coco: Path | None = None
    """Folder with train2017/, val2017/ and annotations/; without it, scenes are generated."""
    window: int | None = None
    """Consecutive tokens that share a choice; default all of an image."""
    group_size: int = 1
    """Neurons that are chosen together, by co-firing; what a CPU gathers may be single rows."""
    block_size: int | None = None
    """Neurons that are computed together; default the group size. Kernels for GPUs want 64."""
    rank: int = 16
    """Of the sketch of the first product, from which sets are chosen."""
    fixed: tuple[float, ...] = (0.6, 0.5, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1, 0.07, 0.05, 0.035, 0.025, 0.015)
    """Densities of fixed sets to choose from."""
    dynamic: tuple[float, ...] = (0.4, 0.3, 0.25, 0.2, 0.15, 0.12, 0.1, 0.08, 0.06, 0.04, 0.025, 0.015)
    """Mean densities of chosen sets to choose from; none searches among fixed sets alone."""
    statistics_images: int = 512
    """Training images for statistics."""
    calibration_images: int = 120
    """Held-out training images for thresholds and for the change of the outputs."""
    accuracy_images: int = 400
    """Other held-out training images, on which ap-loss is measured."""
    eval_images: int = 500
    """Validation images."""
    latency_images: int = 16
    """Images of the batch that is timed."""
    batch_size: int = 20
    """Images per batch elsewhere."""
    turns: int = 15
    """Measured turns of the times."""
    out: Path = Path("runs/search_plan")
    """Folder for the results."""
    overwrite: bool = False
    """Delete an earlier run in the output folder."""


def read_budget(text: str) -> tuple[str, float]:
    """The kind of a budget and its number.

    Raises:
        ValueError: if it is none.
    """
    kind, _, number = text.partition("=")
    try:
        value = float(number)
    except ValueError:
        value = np.nan
    if kind not in BUDGETS or not value > 0 or (kind != "ap-loss" and value > 1):
        raise ValueError(
            f"{text!r} is no budget: ap-loss=0.5 (points), latency=0.4 or density=0.2 (shares up to 1) would be"
        )
    return kind, value


class Search:
    """The candidates of every FFN with their losses and times, and what can be chosen among them."""

    def __init__(self, arguments: Arguments):
        self.arguments = arguments
        self.own = model = detr_jax.load(arguments.model, preset=arguments.preset)
        self.names = model.config.ffn_names
        held_out = arguments.calibration_images + arguments.accuracy_images
        training = open_dataset(arguments.coco, "train", arguments.statistics_images + held_out)
        self.validation = open_dataset(arguments.coco, "val", arguments.eval_images)
        if len(training) <= held_out:
            raise ValueError(f"{training.name} has {len(training)} images, too few to hold out {held_out}")
        ends = (0, len(training) - held_out, len(training) - arguments.accuracy_images, len(training))
        sample, calibration, accuracy = (Subset(training, *part) for part in itertools.pairwise(ends))
        self.data = {"statistics": sample.name, "calibration": calibration.name, "accuracy": accuracy.name}
        self.data["validation"] = self.validation.name

        size = arguments.group_size
        with tqdm(total=len(sample), desc="activation statistics", unit="image") as bar:
            path = arguments.out / "activations.safetensors"
            profile = profile_activations(model, sample, arguments.batch_size, 1, path, bar.update)
        self.orders = {name: np.arange(model.config.ffn_features) for name in self.names}
        statistics = {name: profile.statistics[name] for name in self.names}
        if size > 1:
            self.orders = {name: cofiring_order(s.cofired, size) for name, s in statistics.items()}
            statistics = {name: s.of_neurons(self.orders[name]) for name, s in statistics.items()}
        self.model = reorder(model, self.orders)

        self.held_out = self.embed(calibration, "embedding calibration images")
        self.accuracy = Judge(self, accuracy, "embedding images for AP")
        timed = Subset(calibration, 0, min(arguments.latency_images, len(calibration)))
        (self._timed,) = embedded_batches(model, timed, len(timed), "embedding the batch that is timed")
        self.change = OutputChange(self.model, self.held_out)
        self.candidates = self._candidates(statistics, self.embed(sample, "embedding images for statistics"))
        self.losses = self._losses()
        self.seconds = self.times(self.candidates, "timing candidates")

    def embed(self, dataset: Dataset, title: str) -> list[EmbeddedBatch]:
        return list(embedded_batches(self.own, dataset, self.arguments.batch_size, title))

    def _candidates(
        self, statistics: dict[str, ActivationStatistics], sample: list[EmbeddedBatch]
    ) -> dict[str, list[Candidate]]:
        arguments, weights = self.arguments, self.model.ffn_weights()
        passes = StoredPasses([batch.tokens for batch in self.held_out])
        inputs, hidden = measure_moments(self.model, StoredPasses([batch.tokens for batch in sample]))
        scores = {
            name: Pooled(
                sketch(weights[name], m.mean, m.covariance, arguments.rank, arguments.group_size),
                odds=False,
                window=arguments.window,
            )
            for name, m in inputs.items()
        }
        decisions = collect_scores(self.model, passes, scores)
        execution = Execution(arguments.window, arguments.block_size or arguments.group_size)
        return {
            name: candidates_of(
                Material(weights[name], statistics[name], hidden[name], scores[name], decisions[name], execution),
                arguments.fixed,
                arguments.dynamic,
            )
            for name in self.names
        }

    def _losses(self) -> dict[str, np.ndarray]:
        """Of each FFN the change of the outputs with each of its candidates, the other FFNs being dense."""
        total = sum(map(len, self.candidates.values()))
        dense = {name: of[0].trial for name, of in self.candidates.items()}
        with tqdm(total=total, desc="changes of the outputs", unit="candidate") as bar:

            def loss(name: str, candidate: Candidate) -> float:
                bar.update()
                return 0.0 if candidate.kind == "dense" else self.change(dense | {name: candidate.trial})

            return {name: np.array([loss(name, c) for c in of]) for name, of in self.candidates.items()}

    def times(self, candidates: dict[str, Sequence[Candidate]], title: str) -> dict[str, np.ndarray]:
        """Of each FFN the seconds of some candidates on a batch of calibration images."""
        images = self._timed.tokens
        traces = jax.jit(type(self.model).traces)(self.model, images, {})
        weights = self.model.ffn_weights()
        return {
            name: np.array(
                measure_times(
                    weights[name],
                    traces[name],
                    [c.selector for c in candidates[name]],
                    [c.order for c in candidates[name]],
                    self.arguments.turns,
                )
            )
            for name in tqdm(self.names, desc=title, unit="FFN")
        }

    def choose(self, unit: str, share: float, kinds: Sequence[str]) -> dict[str, int]:
        """The candidate of each FFN that together lose least within a share of what the dense FFNs cost.

        Args:
            unit: "latency" or "density".
            share: of the dense FFNs' cost.
            kinds: of the candidates to choose from.

        Raises:
            ValueError: if no candidates cost so little.
        """
        kept, losses, costs = [], [], []
        for name, cost in self.costs(unit).items():
            allowed = np.array([i for i, c in enumerate(self.candidates[name]) if c.kind in kinds])
            rows = allowed[undominated(self.losses[name][allowed], cost[allowed])]
            kept.append(rows), losses.append(self.losses[name][rows]), costs.append(cost[rows])
        # `greedy` wants as many settings of every FFN.
        longest = max(map(len, kept))
        tables = (np.stack([np.pad(row, (0, longest - len(row)), "edge") for row in rows]) for rows in (losses, costs))
        choice: Choice = greedy(*tables, share)
        return {name: int(rows[min(c, len(rows) - 1)]) for name, rows, c in zip(self.names, kept, choice, strict=True)}

    def costs(self, unit: str) -> dict[str, np.ndarray]:
        """Of each FFN what its candidates cost, as shares of all dense FFNs."""
        if unit == "density":
            return {name: np.array([c.density for c in of]) / len(self.names) for name, of in self.candidates.items()}
        dense = sum(seconds[0] for seconds in self.seconds.values())
        return {name: seconds / dense for name, seconds in self.seconds.items()}

    def cost(self, choice: dict[str, int], unit: str) -> float:
        """What a choice costs, as a share of the dense FFNs."""
        return float(sum(self.costs(unit)[name][i] for name, i in choice.items()))

    def ladder(self, shares: Sequence[float], kinds: Sequence[str], unit: str = "latency") -> list[dict[str, int]]:
        """Choices for shares of what the dense FFNs cost, as far as there are some that cost so little."""
        costs = self.costs(unit).items()
        least = sum(
            min(cost[i] for i, c in enumerate(self.candidates[name]) if c.kind in kinds) for name, cost in costs
        )
        return [self.choose(unit, share, kinds) for share in shares if share > least]

    def within_loss(self, points: float, kinds: Sequence[str]) -> dict[str, int]:
        """The fastest choice that loses at most so many points of AP on the images for that, by bisection."""
        choices = [dict.fromkeys(self.names, 0), *self.ladder(LADDER, kinds)]
        good, bad = 0, len(choices)
        with tqdm(desc=f"AP, {' and '.join(kinds)}", unit="plan") as bar:
            while bad - good > 1:
                middle = (good + bad) // 2
                lost = -100 * self.accuracy(choices[middle])["AP_minus_dense"]
                bar.set_postfix(points=f"{-lost:+.2f}")
                bar.update()
                good, bad = (middle, bad) if lost <= points else (good, middle)
        return choices[good]

    def within(self, budget: tuple[str, float], kinds: Sequence[str]) -> dict[str, int]:
        """The choice for a budget."""
        kind, value = budget
        return self.within_loss(value, kinds) if kind == "ap-loss" else self.choose(kind, value, kinds)

    def chosen(self, choice: dict[str, int]) -> dict[str, Candidate]:
        return {name: self.candidates[name][i] for name, i in choice.items()}

    def plan(self, choice: dict[str, int], measured: Row) -> Plan:
        """The plan of a choice, in the detector's own numbering of its neurons."""
        sparse = {name: c for name, c in self.chosen(choice).items() if c.selector is not None}
        return Plan(
            method="search",
            fingerprint=detr_jax.fingerprint(self.own),
            selectors={name: c.selector for name, c in sparse.items()},
            orders={name: self.orders[name][c.order] for name, c in sparse.items()},
            training={"budget": self.arguments.budget, "data": self.data} | cli.settings(self.arguments),
            measured=measured,
            versions=cli.provenance(self.arguments)["versions"],
        )


class Judge:
    """Measures choices on images, in the masked reference."""

    def __init__(self, search: Search, dataset: Dataset, title: str):
        config = search.own.config
        size = resized_size(np.median(dataset.image_sizes(), axis=0), config.shortest_side, config.longest_side)
        flops = dense_flops(search.own, *size)
        embedded = search.embed(dataset, title)
        self._search = search
        self._comparison = Comparison(embedded, dataset.ground_truth(), flops, search.arguments.group_size, search.own)

    def __call__(self, choice: dict[str, int]) -> Row:
        """AP and its difference to dense with their intervals, densities and work; see `Comparison.row`."""
        model = self._search.model
        trials = {name: candidate.trial for name, candidate in self._search.chosen(choice).items()}
        return self._comparison.row(model.config, trials, self._comparison.detect(model, trials))


CHOICES = {
    "any": KINDS,
    "fixed or dynamic sets": ("dense", "fixed", "dynamic"),
    "fixed sets": ("dense", "fixed"),
}
"""What is compared: the search, and what it would find without some of the candidates."""
CURVE = (0.6, 0.5, 0.4, 0.33, 0.27, 0.22, 0.18, 0.14)
"""Shares of the dense FFNs' time and density whose accuracy is measured for the figure."""


def point(judge: Judge, choice: dict[str, int], time_share: float) -> Row:
    """What the figure shows of a choice."""
    row = judge(choice)
    keys = ("AP_minus_dense", "AP_minus_dense_interval", "AP_interval", "numbers", "density")
    return {key: row[key] for key in keys} | {"time": time_share, "ffn_work": row["flops_share"]["ffns"]}


def main(arguments: Arguments) -> None:
    started = time.perf_counter()
    budget = read_budget(arguments.budget)
    open_run(arguments.out, cli.settings(arguments), OUTPUTS, resume=False, overwrite=arguments.overwrite)
    search = Search(arguments)
    choices = {title: search.within(budget, kinds) for title, kinds in CHOICES.items()}

    # Measured again, beside each other: what was chosen because it seemed fast is not quite as fast.
    contestants = {
        name: [search.candidates[name][0], *(search.candidates[name][choice[name]] for choice in choices.values())]
        for name in search.names
    }
    seconds = search.times(contestants, "timing the plan")
    dense, *others = sum(seconds.values())
    shares = dict(zip(choices, (float(other / dense) for other in others), strict=True))

    judge = Judge(search, search.validation, "embedding validation images")
    measured = {title: point(judge, choice, shares[title]) for title, choice in choices.items()}
    curves = {
        unit: {
            title: [
                point(judge, choice, search.cost(choice, "latency"))
                for choice in tqdm(search.ladder(CURVE, kinds, unit), desc=f"{title} by {unit}", unit="plan")
            ]
            for title, kinds in CHOICES.items()
        }
        for unit in ("latency", "density")
    }
    plan = search.plan(choices["any"], measured["any"])
    save_plan(plan, arguments.out / "plan.safetensors")
    ffns = {
        name: {
            "kind": candidate.kind,
            "always": candidate.always,
            "density": candidate.density,
            "dense_seconds": float(seconds[name][0]),
            "seconds": float(seconds[name][1]),
        }
        for name, candidate in search.chosen(choices["any"]).items()
    }
    report(measured, ffns)
    device = jax.devices()[0].device_kind
    title = f"{arguments.model}, {arguments.budget}, {search.validation.name}, {device}"
    plot_search(arguments.out / "search.png", title, curves, measured["any"], ffns)
    candidates = {
        name: [
            {"kind": c.kind, "density": c.density, "always": c.always, "loss": float(loss), "seconds": float(time)}
            for c, loss, time in zip(of, search.losses[name], search.seconds[name], strict=True)
        ]
        for name, of in search.candidates.items()
    }
    taken = time.perf_counter() - started
    results = {"choices": measured, "ffns": ffns, "curves": curves, "candidates": candidates, "data": search.data}
    write_json(arguments.out / RESULTS, results | {"seconds": taken} | cli.provenance(arguments))
    print(f"\nplan.safetensors, results.json and search.png are in {arguments.out} after {taken:.0f} s")


def report(measured: dict[str, Row], ffns: dict[str, dict]) -> None:
    """Prints what the plan does with each FFN, and what it costs."""
    header = ("FFN", "computes", "always", "neurons", "dense ms", "plan ms", "faster")
    lines = [
        (
            *(name, of["kind"], of["always"], of["density"]),
            *(1e3 * of["dense_seconds"], 1e3 * of["seconds"], of["dense_seconds"] / of["seconds"]),
        )
        for name, of in ffns.items()
    ]
    print(f"\n{table(header, lines)}\n")
    header = ("", "AP", "points against dense", "neurons", "FFNs faster")
    rows = [
        (title, row["numbers"]["AP"], points(row), row["density"], 1 / row["time"]) for title, row in measured.items()
    ]
    print(table(header, rows))


def points(row: Row) -> str:
    """A difference of AP in points with its interval."""
    low, high = (100 * bound for bound in row["AP_minus_dense_interval"])
    return f"{100 * row['AP_minus_dense']:+.2f} [{low:+.2f}, {high:+.2f}]"


if __name__ == "__main__":
    cli.run(main, Arguments)
