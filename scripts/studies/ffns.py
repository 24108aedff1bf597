"""Studies what sparsity does to FFNs that are given as arrays with samples of their inputs."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import jax.numpy as jnp
import numpy as np
import tyro
from common import check_options, train
from ffn_study import (
    Densities,
    Effect,
    Effects,
    MeasuredSelector,
    image_batches,
    measure_effects,
    plot_errors,
    plot_tiles,
    read_ffns,
    study_markdown,
)
from standalone import StandaloneFFNs
from tile_density import TILE_SIZES, measure_tiles
from tqdm import tqdm

from detr_jax.calibration.activations import ActivationStatistics, measure_activations, require_active
from detr_jax.calibration.inputs import draw_inputs
from detr_jax.calibration.moments import measure_moments
from detr_jax.calibration.permutation import coactivation_permutation, kmeans_permutation
from detr_jax.calibration.thresholds import selectors_at_densities
from detr_jax.commands import cli
from detr_jax.data.batches import CachedBatches
from detr_jax.errors import InputError
from detr_jax.files import refuse_existing, replacing, write_json
from detr_jax.methods import (
    METHODS,
    ContributionSketch,
    Experts,
    FitMaterial,
    Fixed,
    HiddenMagnitude,
    Method,
    Oracle,
    Pooled,
    Score,
    TopK,
    TrainedMethod,
    by_contribution,
    find_indicators,
    sketch,
)
from detr_jax.methods.grouping import group_count
from detr_jax.methods.reconstruction import obs_ranking, reconstruct_output
from detr_jax.models.ffn import permute
from detr_jax.training.gates import Gates, GateTraining
from detr_jax.viz.figures import save_figure

WINDOW = 32
"""Consecutive tokens of the table of fixed and chosen neurons that share a decision."""

Statistics = dict[str, ActivationStatistics]


@dataclass(frozen=True)
class Arguments:
    """Studies what sparsity does to FFNs that are given as arrays with samples of their inputs, each for itself.

    The file is an .npz with layerL.w1 (F, d), layerL.b1 (F,), layerL.w2 (d, F), layerL.b2 (d,) and layerL.x (images,
    tokens, d) for L = 0, 1, ... The first half of the images is for statistics, gates and thresholds, the other half is
    measured: what a part of the neurons leaves of the output, how dense firing is for tiles of tokens, and the output's
    error against the multiply-adds that every selector leaves.

    For example `python scripts/studies/ffns.py ffns.npz --out runs/ffns`. Writes results.json, tables.md, errors.png
    and tiles.png into the output folder.
    """

    ffns: tyro.conf.Positional[Path]
    """The .npz file."""
    training: Annotated[GateTraining, tyro.conf.OmitArgPrefixes] = field(
        default_factory=lambda: GateTraining(epochs=60, batch_size=2, learning_rate=6e-3)
    )
    wide_group_size: int = 64
    """Hidden neurons per group of the second size that tiles are counted for."""
    tile_sizes: tuple[int, ...] = TILE_SIZES
    """Tokens per tile."""
    densities: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.5)
    """Shares of the groups, neurons or channels that thresholds are calibrated to."""
    taus: tuple[float, ...] = (0.99, 0.95, 0.9, 0.8)
    """Of SIBS: the least share of an indicator's firings in which a neuron that it silences is silent."""
    indicators: int = 32
    """Of SIBS: indicators per FFN."""
    out: Path = Path("runs/ffns")
    """Folder for the results."""
    overwrite: bool = False
    """Replace the results in the output folder."""


@dataclass(frozen=True)
class Halves:
    """The inputs to calibrate on and those to measure."""

    calibration: CachedBatches
    test: CachedBatches


def permuted(ffns: StandaloneFFNs, orders: Mapping[str, np.ndarray]) -> StandaloneFFNs:
    """The same functions with their neurons in other orders."""
    return StandaloneFFNs({name: permute(weights, orders[name]) for name, weights in ffns.weights.items()})


def coactivation(statistics: Statistics, group_size: int) -> dict[str, np.ndarray]:
    """Permutation of each FFN that brings neurons together that are active together."""
    return {name: coactivation_permutation(s.coactive, group_size) for name, s in statistics.items()}


def fixed_and_chosen(ffns: StandaloneFFNs, halves: Halves) -> dict[str, dict[str, float]]:
    """By what is measured, of each FFN: how much is zero, and the errors of keeping a part of the neurons."""
    calibration = measure_activations(ffns, halves.calibration)
    test = measure_activations(ffns, halves.test)
    rows = {
        "activations that are exactly zero": {
            n: 1 - s.fired.sum() / (s.tokens.sum() * s.fired.size) for n, s in test.items()
        },
        "neurons that fire at all in an image": {n: s.images_fired.mean() / s.images for n, s in test.items()},
    }
    contributions = HiddenMagnitude(weighted=True)

    def fixed(name: str) -> Score:
        return by_contribution(calibration[name], ffns.weights[name], 1)

    def pooled(window: int | None) -> Callable[[str], Score]:
        return lambda name: Pooled(contributions, odds=False, window=window)

    for title, share, score in (
        ("error, one fixed set of 25 % of the neurons", 0.25, fixed),
        ("error, best 25 % per image", 0.25, pooled(None)),
        (f"error, best 25 % per {WINDOW} consecutive tokens", 0.25, pooled(WINDOW)),
        ("error, one fixed set of 50 %", 0.5, fixed),
    ):
        selectors = {
            name: TopK(score(name), jnp.int32(round(share * len(weights.w_in))))
            for name, weights in ffns.weights.items()
        }
        effects = measure_effects(ffns, halves.test.batches(), selectors)
        rows[title] = {name: effect.error for name, effect in effects.items()}
    return {title: {name: float(value) for name, value in row.items()} for title, row in rows.items()}


def tile_densities(
    ffns: StandaloneFFNs, statistics: Statistics, halves: Halves, arguments: Arguments
) -> dict[str, dict[str, Densities]]:
    """Of each FFN, by how its neurons are grouped."""
    size, wide = arguments.training.group_size, arguments.wide_group_size
    kmeans = {name: kmeans_permutation(np.asarray(weights.w_in), size) for name, weights in ffns.weights.items()}
    groupings = {
        f"groups of {size}, given order": (size, ffns),
        f"groups of {size} by co-activation": (size, permuted(ffns, coactivation(statistics, size))),
        f"groups of {size} by k-means": (size, permuted(ffns, kmeans)),
        f"groups of {wide} by co-activation": (wide, permuted(ffns, coactivation(statistics, wide))),
    }
    measured = {
        title: measure_tiles(
            model,
            halves.test.batches(),
            dict.fromkeys(model.weights, Oracle(group_size)),
            group_size,
            arguments.tile_sizes,
        )
        for title, (group_size, model) in tqdm(groupings.items(), desc="counting tiles", unit="grouping")
    }
    return {name: {title: of_ffns[name] for title, of_ffns in measured.items()} for name in ffns.weights}


SHARES = (0.25, 0.125, 0.0625)
"""Of the neurons, for the table of sets that are decided for many tokens at once."""


EXPERTS = Experts(experts=8, rounds=0, ranking="obs")
"""Of that table: more experts, or a router that is trained, are no better with as few tokens."""


def shared_sets(ffns: StandaloneFFNs, halves: Halves) -> dict[str, dict[str, dict[str, float]]]:
    """By share of the neurons and how they are chosen, of each FFN the error of its output.

    Fixed sets, narrow experts, then for whole images and for windows sets by a sketch, and the best.
    """
    statistics = measure_activations(ffns, halves.calibration)
    inputs, hidden = measure_moments(ffns, halves.calibration)
    sketches = {
        name: sketch(ffns.weights[name], m.mean, m.covariance, min(ContributionSketch.rank, len(m.mean)), 1)
        for name, m in inputs.items()
    }
    contributions = HiddenMagnitude(weighted=True)
    errors: dict[str, dict[str, dict[str, float]]] = {}
    drawn = tokens_for(EXPERTS, ffns, halves)
    for share in SHARES:
        count = {name: round(share * len(weights.w_in)) for name, weights in ffns.weights.items()}

        def measure(score_of: Callable[[str], Score], count: dict[str, int] = count) -> dict[str, float]:
            selectors = {name: TopK(score_of(name), jnp.int32(k)) for name, k in count.items()}
            return {n: e.error for n, e in measure_effects(ffns, halves.test.batches(), selectors).items()}

        def reconstructed(name: str, count: dict[str, int] = count) -> Fixed:
            order = obs_ranking(ffns.weights[name], hidden[name])
            kept = np.isin(np.arange(len(order)), order[: count[name]])
            return Fixed(jnp.asarray(kept), reconstruct_output(ffns.weights[name], hidden[name], kept))

        of_share = {"fixed": measure(lambda name: by_contribution(statistics[name], ffns.weights[name], 1))}
        effects = measure_effects(ffns, halves.test.batches(), {name: reconstructed(name) for name in ffns.weights})
        of_share["fixed, reconstructed"] = {name: effect.error for name, effect in effects.items()}
        routed = selectors_at_densities(ffns, halves.calibration, EXPERTS, drawn, (share,))
        effects = measure_effects(ffns, halves.test.batches(), {name: of[0] for name, of in routed.items()})
        of_share[f"{EXPERTS.experts} experts"] = {name: effect.error for name, effect in effects.items()}
        for title, window in (("per image", None), (f"per {WINDOW} tokens", WINDOW)):
            by_sketch = {name: Pooled(of_one, False, window) for name, of_one in sketches.items()}
            of_share |= {
                f"sketch, {title}": measure(by_sketch.get),
                f"best, {title}": measure(lambda name, window=window: Pooled(contributions, False, window)),
            }
        errors[f"{share:g}"] = of_share
    return errors


def tokens_for(method: Experts, ffns: StandaloneFFNs, halves: Halves) -> dict[str, FitMaterial]:
    """The tokens of each FFN that experts are fitted to."""
    images = sum(len(next(iter(batch.x.values()))) for batch in halves.calibration.batches())
    drawn = draw_inputs(ffns, halves.calibration.batches(), method.tokens, images, method.seed)
    return {name: FitMaterial(weights, inputs=drawn[name], name=name) for name, weights in ffns.weights.items()}


def train_briefly(ffns: StandaloneFFNs, batches: CachedBatches, methods: Sequence[TrainedMethod]) -> dict[str, Gates]:
    """Gates of some methods, without checkpoints that outlast the run."""
    with TemporaryDirectory() as folder:
        return train(ffns, batches, methods, Path(folder))


def methods(training: GateTraining) -> list[Method]:
    """Every method that can be given a density."""
    return [training.method(method) for method in METHODS.values() if method.tuned_by != "nothing"]


def compare_selectors(
    ffns: StandaloneFFNs, gates: Mapping[str, Gates], halves: Halves, arguments: Arguments
) -> Effects:
    """What every selector does to each FFN."""
    size = arguments.training.group_size
    statistics = measure_activations(ffns, halves.calibration)
    inputs, hidden = measure_moments(ffns, halves.calibration)

    def material(method: Method) -> dict[str, FitMaterial]:
        if isinstance(method, Experts):
            return tokens_for(method, ffns, halves)
        gate = gates[method.gates.name] if isinstance(method, TrainedMethod) else dict.fromkeys(ffns.weights)
        return {
            name: FitMaterial(weights, statistics[name], inputs[name], hidden[name], gate[name], name)
            for name, weights in ffns.weights.items()
        }

    def same(selector: MeasuredSelector) -> dict[str, MeasuredSelector]:
        return dict.fromkeys(ffns.weights, selector)

    def indicated(tau: float) -> dict[str, MeasuredSelector]:
        return {n: find_indicators(s, tau=tau, indicators=arguments.indicators, name=n) for n, s in statistics.items()}

    settings = {
        "oracle, neurons": {"exact": same(Oracle(1))},
        "oracle, groups": {"exact": same(Oracle(size))},
        "sibs": {f"tau {tau:g}": indicated(tau) for tau in arguments.taus},
    }
    for method in tqdm(methods(arguments.training), desc="calibrating selectors", unit="method"):
        found = selectors_at_densities(ffns, halves.calibration, method, material(method), arguments.densities)
        settings[method.name] = {
            f"{density:g}": {name: selectors[i] for name, selectors in found.items()}
            for i, density in enumerate(arguments.densities)
        }
    with tqdm(total=sum(map(len, settings.values())), desc="measuring selectors", unit="setting") as bar:

        def measure(selectors: Mapping[str, MeasuredSelector]) -> dict[str, Effect]:
            effects = measure_effects(ffns, halves.test.batches(), selectors)
            bar.update()
            return effects

        measured = {m: {setting: measure(chosen) for setting, chosen in of.items()} for m, of in settings.items()}
    return {
        name: {method: {setting: effects[name] for setting, effects in of.items()} for method, of in measured.items()}
        for name in ffns.weights
    }


def main(arguments: Arguments) -> None:
    started = time.perf_counter()
    refuse_existing(arguments.out / "results.json", arguments.overwrite)
    check_options(arguments, shares=("densities", "taus"), least={"tile_sizes": 1})
    ffns, inputs = read_ffns(arguments.ffns)
    training = arguments.training
    for weights in ffns.weights.values():
        for group_size in (training.group_size, arguments.wide_group_size):
            group_count(len(weights.w_in), group_size)
    count = len(next(iter(inputs.x.values())))
    if count < 2:
        raise InputError(
            f"{arguments.ffns} has the inputs of {count} image; at least 2 are needed, one half to test on"
        )
    calibration = image_batches(inputs, range(count // 2), training.batch_size)
    test = image_batches(inputs, range(count // 2, count), training.batch_size)
    halves = Halves(CachedBatches(calibration), CachedBatches(test))
    images = {"calibration": count // 2, "test": count - count // 2}

    statistics = measure_activations(ffns, halves.calibration)
    require_active(statistics, f"the first {images['calibration']} images of {arguments.ffns}")
    basics = fixed_and_chosen(ffns, halves)
    tiles = tile_densities(ffns, statistics, halves, arguments)
    ordered = permuted(ffns, coactivation(statistics, training.group_size))
    trained = dict.fromkeys(method.gates for method in methods(training) if isinstance(method, TrainedMethod))
    gates = train_briefly(ordered, CachedBatches(calibration, training.seed), list(trained))
    effects = compare_selectors(ordered, gates, halves, arguments)
    sets = shared_sets(ffns, halves)

    text = study_markdown(images, basics, sets, tiles, effects)
    print(text)
    with replacing(arguments.out / "tables.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    title = f"{arguments.ffns.stem}: {images['calibration']} images to calibrate on, {images['test']} to test on"
    save_figure(plot_errors(title, effects), arguments.out / "errors.png")
    save_figure(plot_tiles(title, tiles), arguments.out / "tiles.png")
    seconds = time.perf_counter() - started
    write_json(
        arguments.out / "results.json",
        {
            "images": images,
            "basics": basics,
            "sets": sets,
            "tiles": tiles,
            "selectors": {
                name: {method: {s: asdict(effect) for s, effect in of.items()} for method, of in methods.items()}
                for name, methods in effects.items()
            },
            "seconds": seconds,
            **cli.provenance(arguments),
        },
    )
    print(f"\nresults.json, tables.md, errors.png and tiles.png are in {arguments.out} after {seconds:.0f} s")


if __name__ == "__main__":
    cli.run(main, Arguments)
