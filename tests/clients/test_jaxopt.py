"""JAXopt passes params but no loss; the loss function is the user's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from client_packages import breast_cancer, import_client

import lalerg_optax as lo
from lalerg_optax import Verdict

jaxopt = import_client("jaxopt")


def loss_fn(params, data):
    x, y = data
    logits = x @ params["w"] + params["b"]
    return optax.losses.sigmoid_binary_cross_entropy(logits, y).mean()


OPTIMIZERS = {
    "lalerg": lambda: lo.lalerg(1e-3),
    "error_regulate": lambda: lo.error_regulate(optax.adam(1e-2)),
}
ADAM = optax.adam(1e-2)
ADAPTED = {  # name: loss function, adapter, what to start from
    "no loss": (loss_fn, lo.without_value, lambda params: params),
    "carried loss": (lo.carry_value(loss_fn), lo.value_from_gradient, lo.Carrier),
}


def batches(num_steps=200, bad=None):
    x, y = breast_cancer()
    rows = np.random.default_rng(0).integers(0, len(y), (num_steps, 64))
    for t, index in enumerate(rows):
        batch = x[index].copy()
        if t == bad:
            batch[3, 5] = np.nan
        yield batch, y[index]


def train(solver, params, data):
    data = list(data)
    state = solver.init_state(params, data[0])
    update, verdicts = jax.jit(solver.update), []
    for batch in data:
        params, state = update(params, state, batch)
        if solver.opt is not ADAM:
            verdicts.append(int(lo.metrics(state.internal_state)["verdict"]))
    return params, state, verdicts


def final_loss(params):
    return loss_fn(params, breast_cancer())


def start():
    return {"w": jnp.zeros(30), "b": jnp.zeros(())}


@pytest.mark.parametrize("kind", ADAPTED)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_regression_with_a_bad_batch_ends_as_well_as_adam_without(name, kind):
    bare, _, _ = train(jaxopt.OptaxSolver(loss_fn, ADAM), start(), batches())
    fn, adapter, wrap = ADAPTED[kind]
    solver = jaxopt.OptaxSolver(fn, adapter(OPTIMIZERS[name]()))
    params, state, verdicts = train(solver, wrap(start()), batches(bad=90))
    params = getattr(params, "params", params)
    drop = final_loss(start()) - final_loss(bare)
    assert final_loss(params) < final_loss(bare) + 0.02 * drop
    assert verdicts[90] == Verdict.SKIP
    assert verdicts.count(Verdict.SKIP) == 1
    assert verdicts.count(Verdict.REVERT) == 0
    has_seen_the_loss = lo.metrics(state.internal_state)["avg_value"] != 0.0
    assert has_seen_the_loss == (kind == "carried loss")


def test_a_whole_run_of_the_solver_carries_the_loss():
    tx = lo.value_from_gradient(lo.error_regulate(optax.adam(3e-2)))
    solver = jaxopt.OptaxSolver(lo.carry_value(loss_fn), tx, maxiter=300)
    end = solver.run(lo.Carrier(start()), breast_cancer())
    np.testing.assert_allclose(
        end.state.value, final_loss(end.params.params), rtol=0.01
    )
    assert end.params.slot == 0.0
    assert lo.metrics(end.state.internal_state)["num_accepted"] == 300


def test_what_jaxopt_leaves_out_is_told_with_the_adapter_for_it():
    solver = jaxopt.OptaxSolver(loss_fn, lo.lalerg())
    with pytest.raises(TypeError, match="without_value"):
        solver.run(start(), breast_cancer())
