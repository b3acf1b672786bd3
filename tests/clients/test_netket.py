"""NetKet's variational Monte Carlo passes forces and params, and no energy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from client_packages import import_client

import lalerg_optax as lo

nk = import_client("netket")

OPTIMIZERS = {
    "lalerg": lambda: lo.without_value(lo.lalerg(1e-3, weight_decay=0.0)),
    "error_regulate": lambda: lo.without_value(lo.error_regulate(optax.adam(2e-2))),
}
NUM_STEPS, BAD_STEP = 200, 80


@pytest.fixture(autouse=True)
def _double_precision():
    """As NetKet sets it when it is imported."""
    with jax.enable_x64(True):
        yield


def spoilt_at(bad_step):
    """Returns a link that makes the forces of one step NaN."""

    def update_fn(updates, count, params=None):
        del params
        factor = jnp.where(count == bad_step, jnp.nan, 1.0)
        return jax.tree.map(lambda u: factor * u, updates), count + 1

    return optax.GradientTransformation(lambda _: jnp.zeros((), jnp.int32), update_fn)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_ground_state_of_a_chain_is_found_in_spite_of_a_nan(name):
    hilbert = nk.hilbert.Spin(0.5, 6)
    energy = nk.operator.Ising(hilbert, nk.graph.Chain(6), h=1.0)
    state = nk.vqs.FullSumState(
        hilbert, nk.models.RBM(alpha=2, param_dtype=float), seed=0
    )
    tx = optax.chain(spoilt_at(BAD_STEP), OPTIMIZERS[name]())
    driver = nk.VMC(energy, tx, variational_state=state)
    driver.run(NUM_STEPS, out=None, show_progress=False)
    exact = nk.exact.lanczos_ed(energy)[0]
    np.testing.assert_allclose(state.expect(energy).mean.real, exact, rtol=5e-3)
    assert lo.metrics(driver._optimizer_state)["num_skipped"] == 1
