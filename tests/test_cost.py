"""What XLA says of the compiled step: no copies, no temporaries."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest

import lalerg_optax as lo

SIDE, NUM_LEAVES = 512, 4
NUM_PARAMS = SIDE * SIDE * NUM_LEAVES

STEPS = {
    "lalerg": lo.lalerg(1e-3),
    "lalerg without search": lo.lalerg(1e-3, search=False),
    "lalerg with clipping": lo.lalerg(1e-3, clip_norm=1.0),
    "lalerg with Adam of another maker": lo.lalerg(1e-3, micro=optax.scale_by_adam()),
    "regulated adamw": lo.error_regulate(optax.adamw(1e-3)),
    "regulated momentum": lo.error_regulate(optax.sgd(1e-3, momentum=0.9)),
}


def compiled_step(tx):
    tx = optax.with_extra_args_support(tx)

    def step(params, state, grads, value):
        updates, state = tx.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    params = {f"w{i}": jnp.ones((SIDE, SIDE)) for i in range(NUM_LEAVES)}
    args = (params, tx.init(params), params, jnp.float32(1.0))
    return jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile()


@pytest.mark.parametrize("tx", STEPS.values(), ids=STEPS.keys())
def test_protection_needs_no_temporaries_and_no_copies(tx):
    compiled = compiled_step(tx)
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    assert temporaries < 0.02 * NUM_PARAMS, "scalars and windows only"
    copies = re.findall(rf"f32\[{SIDE},{SIDE}\]\S* copy\(", compiled.as_text())
    assert not copies


def test_state_is_that_of_adam_and_one_anchor():
    params = jnp.ones((SIDE, SIDE))
    size = lambda tx: optax.tree.size(tx.init(params))  # noqa: E731
    extra = size(lo.lalerg(1e-3)) - size(optax.adamw(1e-3))
    assert params.size <= extra < params.size + 400
