"""A detector whose groups are really left out gives what the masked reference gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import change_backend
from tiny import TINY_CONFIG, every_selector, outputs, tiny_detector, tiny_ffn

from detr_jax import fingerprint, load_sparse
from detr_jax.commands.options import ExecutionOptions
from detr_jax.kernels import Execution
from detr_jax.methods import Executed, InputMagnitude, LinearGate, Oracle, PartitionedSelector, Pooled, Thresholded
from detr_jax.models.ffn import forward
from detr_jax.plan import Plan, load_plan, save_plan
from detr_jax.plan.checks import check_fit


def test_the_exact_mode_is_the_masked_reference():
    weights, x, tokens = tiny_ffn()
    selector = Oracle(4)
    masked = forward(weights, x, selector(weights, x, tokens))
    for execution in (Execution(None, 4, exact=True), Execution(2, 12, exact=True, ordered=True)):
        run = jax.jit(
            lambda x, execution=execution: forward(weights, x, Executed(selector, execution)(weights, x, tokens))
        )
        np.testing.assert_allclose(np.asarray(run(x))[tokens], np.asarray(masked)[tokens], atol=1e-5)


@pytest.mark.parametrize("name", every_selector(tiny_ffn()[0], 4))
def test_without_images_there_are_no_outputs(name):
    """Decisions and masked reference of every kind; the execution where it can compute the selector."""
    weights, x, tokens = tiny_ffn(images=0)
    selector = every_selector(weights, 4)[name]
    assert forward(weights, x, selector(weights, x, tokens)).shape == x.shape
    if not any(part in name for part in ("input", "compensated")):
        assert forward(weights, x, Executed(selector, Execution(2))(weights, x, tokens)).shape == x.shape


def test_padding_needs_nothing():
    weights, x, tokens = tiny_ffn()
    selection = Executed(Oracle(4), Execution())(weights, x, tokens)
    assert not selection.active[~tokens].any() and selection.active.any()


def test_a_detector_gives_the_same_outputs():
    model = tiny_detector()
    rng = np.random.default_rng(0)
    images, mask = jnp.asarray(rng.random((2, 32, 40, 3)), jnp.float32), jnp.ones((2, 32, 40), bool)
    selectors = dict.fromkeys(TINY_CONFIG.ffn_names, Oracle(4))
    dense = outputs(model, images, mask)
    computations = (
        *(ExecutionOptions(), ExecutionOptions("auto")),
        ExecutionOptions("xla", 4, 4, per_token_mask=True),
        ExecutionOptions("xla", 4, 4, per_token_mask=True, sort_tokens=True),
    )
    for computation in computations:
        sparse = outputs(model, images, mask, computation.of(selectors))
        np.testing.assert_allclose(sparse.logits, dense.logits, atol=1e-4)


def test_options():
    (selector,) = ExecutionOptions("xla", 2, 4, sort_tokens=True).of({"encoder.0": Oracle(4)}).values()
    assert selector.execution == Execution(2, 4, ordered=True, implementation="xla")
    own = {"encoder.0": Executed(Oracle(4), Execution(8, 8))}
    assert ExecutionOptions().of(own) == own
    assert ExecutionOptions("masked").of(own) == {"encoder.0": Oracle(4)}
    for implementation in ("plan", "masked"):
        with pytest.raises(ValueError, match=f"--tile-size.* need an --implementation .*, not {implementation}"):
            ExecutionOptions(implementation, tile_size=8).of(own)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("implementation", ["masked", "auto", "xla", "reference"])
def test_plans_run_in_every_type(dtype, implementation):
    """The check of a plan and the call, in the type that the detector computes in."""
    model = tiny_detector(dtype=dtype)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.random((1, 32, 40, 3)), jnp.float32)
    pooled = Pooled(LinearGate(jnp.float32(rng.standard_normal((16, 4))), jnp.zeros(4)), odds=False)
    selectors = {
        "encoder.0": Oracle(4),
        "decoder.0": PartitionedSelector(Thresholded(pooled, jnp.float32(0)), always=8, gated=16),
    }
    plan = Plan("oracle", fingerprint(model), selectors, {}, {}, {}, {})
    sparse = load_sparse(model, plan, implementation=implementation)
    masked = load_sparse(model, plan)
    error = np.abs(np.asarray(outputs(sparse, images).logits - outputs(masked, images).logits)).max()
    assert error <= (1e-4 if dtype == jnp.float32 else 0.3)


def test_a_plan_is_checked_for_the_type_of_the_detector(monkeypatch):
    """What the Hopper kernel takes depends on the type."""
    asked = []

    def reason(shape):
        asked.append(shape.dtype)
        return None if shape.dtype == jnp.bfloat16 else "not in this type"

    change_backend(monkeypatch, "xla", unsupported_reason=reason)
    selectors = {"encoder.0": Executed(Oracle(8), Execution(implementation="xla"))}
    check_fit(selectors, {}, tiny_detector(dtype=jnp.bfloat16), "the plan")
    assert set(asked) == {jnp.dtype("bfloat16")}
    with pytest.raises(ValueError, match=r"cannot be computed on this device: .*not in this type"):
        check_fit(selectors, {}, tiny_detector(), "the plan")


def test_what_only_the_masked_reference_can():
    weights, x, tokens = tiny_ffn()
    with pytest.raises(ValueError, match="Thresholded does not choose groups of neurons alone"):
        Executed(Thresholded(InputMagnitude(weighted=False), jnp.float32(0.1)), Execution())(weights, x, tokens)
    with pytest.raises(ValueError, match="12 hidden neurons cannot be divided into blocks of 5"):
        forward(weights, x, Executed(Oracle(4), Execution(block_size=5))(weights, x, tokens))
    with pytest.raises(ValueError, match="3 groups of neurons cannot be united into 2 blocks"):
        forward(weights, x, Executed(Oracle(4), Execution(block_size=6))(weights, x, tokens))


def test_a_plan_keeps_how_it_is_executed(tmp_path):
    model = tiny_detector()
    execution = Execution(8, 16, exact=True, implementation="xla")
    plan = Plan("oracle", fingerprint(model), {"encoder.0": Executed(Oracle(4), execution)}, {}, {}, {}, {})
    save_plan(plan, tmp_path / "plan.safetensors")
    assert load_plan(str(tmp_path / "plan.safetensors"), model).selectors["encoder.0"].execution == execution


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a GPU may have the implementation that is missing here")
def test_a_plan_for_another_device_says_what_is_missing(tmp_path):
    model = tiny_detector()
    for name, reason in (("mosaic_gpu", "runs on Hopper GPUs, not on"), ("triton", "there is no implementation")):
        selector = Executed(Oracle(4), Execution(8, 16, implementation=name))
        save_plan(Plan("oracle", fingerprint(model), {"encoder.0": selector}, {}, {}, {}, {}), tmp_path / name)
        with pytest.raises(ValueError, match=f"selector of encoder.0 cannot be computed on this.*{name}.*") as error:
            load_plan(tmp_path / name, model)
        assert reason in str(error.value)
