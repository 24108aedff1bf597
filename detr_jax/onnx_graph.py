"""Functions of JAX as ONNX, through jax2onnx, and what it has to be helped with."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend import core

from detr_jax.errors import InputError, MissingDependencyError
from detr_jax.kernels import Experts

_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "custom_jvp_call": "call_jaxpr"}
"""Parameter with the program that a primitive calls, by the primitive's name."""


def onnx_graph(
    function: Callable[..., Any], inputs: Mapping[str, jax.ShapeDtypeStruct], outputs: Sequence[str]
) -> bytes:
    """The ONNX file of a function of arrays, which computes narrow experts by `kernels.experts.routed_ffn` if at all.

    Args:
        function: of arrays, to a pytree of arrays.
        inputs: arguments by name.
        outputs: names of the results.

    Raises:
        MissingDependencyError: if jax2onnx is not installed.
        InputError: if it has no rule for something that the function computes.
    """
    try:
        import jax2onnx
        import onnx
        from jax2onnx.plugins.plugin_system import PrimitiveLeafPlugin, register_primitive
    except ImportError as error:
        raise MissingDependencyError('ONNX needs the extra `onnx`: pip install "detr-jax[onnx]"') from error
    register_primitive(jaxpr_primitive=_routed.name)(
        type("RoutedFFN", (PrimitiveLeafPlugin,), {"lower": lambda _, *arguments: _lower_routed(*arguments)})
    )
    # jax2onnx replaces functions of JAX and Flax while it traces. What it makes of those of lax is exact, of others
    # not always: nnx.max_pool loses its padding. So it gets a program that was traced without it.
    traced = jax.make_jaxpr(function)(*inputs.values())
    names = {"input_names": list(inputs), "output_names": list(outputs)}
    logger = logging.getLogger("onnx_ir")  # warns of every constant whose type is not known yet
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        model = jax2onnx.to_onnx(lambda *arguments: _replay(traced, arguments), list(inputs.values()), **names)
        onnx.checker.check_model(model)
    except Exception as error:  # of whatever kind it is that its many rules raise
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"jax2onnx {version('jax2onnx')} cannot convert this; a fixed batch may help: {reason}"
        ) from error
    finally:
        logger.setLevel(level)
    return model.SerializeToString()


def _replay(program: core.ClosedJaxpr, arguments: Sequence[Any]) -> list[Any]:
    """Results of a program; what jax2onnx has no rule for, or a wrong one, is computed in other words."""
    jaxpr = program.jaxpr
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*program.consts, *arguments), strict=True))

    def read(variables: Sequence[Any]) -> list[Any]:
        return [v.val if isinstance(v, core.Literal) else values[v] for v in variables]

    for equation in jaxpr.eqns:
        primitive, parameters, operands = equation.primitive, equation.params, read(equation.invars)
        if primitive.name in _CALLS:
            results = _replay(parameters[_CALLS[primitive.name]], operands)
        elif primitive.name == "custom_vmap_call":  # see `kernels.transforms.batched`
            x, *stacks, assignment = operands
            results = [_routed.bind(x, assignment, experts=partial(_experts, *stacks))]  # parameters must be hashable
        elif primitive.name == "reduce_window_max":
            results = [_max_pool(operands[0], **parameters)]
        elif primitive.name == "rem" and jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.integer):
            results = [operands[0] - operands[1] * jax.lax.div(*operands)]  # its rule takes no symbolic sizes
        else:
            results = primitive.bind(*operands, **parameters)
            results = results if primitive.multiple_results else [results]
        values.update(zip(equation.outvars, results, strict=True))
    return read(jaxpr.outvars)


def _max_pool(x: jax.Array, *, window_dimensions: Any, window_strides: Any, padding: Any, **_: Any) -> jax.Array:
    """Over height and width of (batch, height, width, channels): jax2onnx pools lax's windows over all four axes."""
    x = jnp.pad(x, padding, constant_values=-jnp.inf)
    return nnx.max_pool(x, window_shape=window_dimensions[1:3], strides=window_strides[1:3], padding="VALID")


def _experts(*leaves: Any) -> Experts:
    *stacks, b_out = leaves
    w_in, b_in, w_out = (tuple(stacks[i : i + len(stacks) // 3]) for i in range(0, len(stacks), len(stacks) // 3))
    return Experts(w_in, b_in, w_out, b_out)


_routed = core.Primitive("detr_jax.routed_ffn")
_routed.def_abstract_eval(lambda x, assignment, *, experts: x)


def _lower_routed(ctx: Any, equation: Any) -> None:
    """Tokens are sorted by expert and split; each expert computes its own part, which may be empty."""
    x, assignment = map(ctx.get_value_for_var, equation.invars)
    experts: Experts = equation.params["experts"]()
    count = len(experts.b_out)

    def constant(values: Any, dtype: Any) -> Any:
        return ctx.builder.add_initializer_from_array(ctx.fresh_name("routed"), np.asarray(values, dtype))

    def node(operator: str, *operands: Any, outputs: int = 1, **attributes: Any) -> Any:
        names = [ctx.fresh_name("routed") for _ in range(outputs)]
        return getattr(ctx.builder, operator)(*operands, _outputs=names, **attributes)

    tokens = node("Shape", assignment)
    _, order = node("TopK", assignment, tokens, outputs=2, largest=0)  # ties in the order of the tokens
    column = node("Unsqueeze", assignment, constant([1], np.int64))
    chosen = node("Cast", node("Equal", column, constant(range(count + 1), np.int32)), to=7)  # int64
    counts = node("ReduceSum", chosen, constant([0], np.int64), keepdims=0)
    *parts, rest = node("Split", node("Gather", x, order), counts, outputs=count + 1)
    outputs = []
    for first, *stacks in zip(experts.first, *experts[:3], strict=True):
        for i, (w_in, b_in, w_out) in enumerate(zip(*stacks, strict=True), first):
            w_in, b_in, w_out, b_out = (constant(a, np.float32) for a in (w_in, b_in, w_out, experts.b_out[i]))
            hidden = node("Relu", node("Gemm", parts[i], w_in, b_in, transB=1))
            outputs.append(node("Gemm", hidden, w_out, b_out))
    outputs.append(node("Mul", rest, constant(0, np.float32)))  # tokens of no expert
    joined = node("Concat", *outputs, axis=0)
    result = node("ScatterND", x, node("Unsqueeze", order, constant([1], np.int64)), joined)
    result.type, result.shape = x.type, x.shape
    ctx.bind_value_for_var(equation.outvars[0], result)
