"""Adaptive methods that people know, and how each of them is protected.

`METHODS` is what ``methods.py`` measures and what ``test_methods.py`` holds to.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import optax
from optax import contrib
from peers import WEIGHT_DECAY, adamw, linear
from train import is_finite as is_finite

import lalerg_optax as lo

PyTree = Any
Schedule = Callable[[Any], Any]


def cosine(rate: float, num_steps: int) -> Schedule:
    """Cosine decay to zero."""
    return optax.cosine_decay_schedule(rate, num_steps)


def warm_up_cosine(rate: float, num_steps: int) -> Schedule:
    """Linear warm-up over a tenth of the run, then cosine decay to zero."""
    return optax.warmup_cosine_decay_schedule(0.0, rate, num_steps // 10, num_steps)


def warm_restarts(rate: float, num_steps: int) -> Schedule:
    """Cosine decay with warm restarts (SGDR): three times, each twice as long."""
    lengths = [num_steps // 7, 2 * num_steps // 7, 4 * num_steps // 7 + 2]
    return optax.sgdr_schedule(
        [
            {
                "init_value": 0.1 * rate,
                "peak_value": rate,
                "decay_steps": length,
                "warmup_steps": length // 10,
            }
            for length in lengths
        ]
    )


def constant(rate: float, num_steps: int) -> Schedule:
    """The rate itself; a schedule all the same."""
    return optax.constant_schedule(rate)


class Method(NamedTuple):
    """A method, and what has to be known to train with it.

    Attributes:
      make: schedule of the learning rate to the optimizer, as Optax has it.
      rate: learning rate at its peak.
      schedule: peak and number of steps to schedule.
      micro: maker of the same rule as a second level of ``lalerg``, if there is one.
      weight_decay: that of ``lalerg``, for ``micro``.
      begin: params of the model to those that are trained.
      seen: those that are trained to those at which loss and gradient are taken.
      given: gradients to those that the optimizer takes where it is not protected.
      result: state of the optimizer (without protection) and params that are trained
        to params of the model, for evaluation.
    """

    make: Callable[[Any], Any]
    rate: float
    schedule: Callable[[float, int], Schedule] = linear
    micro: Callable[[], Any] | None = None
    weight_decay: float = 0.0
    begin: Callable[[PyTree], PyTree] = lambda params: params
    seen: Callable[[PyTree], PyTree] = lambda params: params
    given: Callable[[PyTree], PyTree] = lambda grads: grads
    result: Callable[[PyTree, PyTree], PyTree] = lambda state, params: params


def looking_ahead(make: Callable[[Any], Any], rate: float) -> Method:
    """Lookahead around a method."""
    return Method(
        lambda lr: optax.lookahead(make(lr), 5, 0.5),
        rate,
        begin=optax.LookaheadParams.init_synced,
        seen=lambda params: params.fast,
        given=lambda grads: grads.fast,
        result=lambda state, params: params.slow,
    )


_one_moment = partial(
    lo.scale_by_micro_rate, eps=0.0, gradient_share=1.0, bias_correction=False
)
_adagrad = partial(_one_moment, b2=1.0, eps_root=1e-7, initial_scale=0.1)
_rmsprop = partial(_one_moment, b2=0.9, eps_root=1e-8)
_adam = partial(lo.scale_by_micro_rate, b2=0.999, gradient_share=0.0)
_per_tensor = partial(lo.scale_by_micro_rate, per_tensor=True)


METHODS: dict[str, Method] = {
    "AdaGrad": Method(optax.adagrad, 0.1, micro=_adagrad),
    "RMSProp": Method(optax.rmsprop, 3e-3, micro=_rmsprop),
    "Adam": Method(optax.adam, 3e-3, micro=_adam),
    "AdaDelta": Method(optax.adadelta, 3.0, micro=optax.scale_by_adadelta),
    "AdamW": Method(adamw, 3e-3, micro=_adam, weight_decay=WEIGHT_DECAY),
    "SGD, momentum": Method(
        partial(optax.sgd, momentum=0.9), 0.05, micro=partial(optax.trace, decay=0.9)
    ),
    "RAdam": Method(optax.radam, 1e-2, micro=optax.scale_by_radam),
    "Lookahead (Adam)": looking_ahead(optax.adam, 3e-3),
    "Ranger": looking_ahead(optax.radam, 2e-2),
    "LAMB": Method(
        optax.lamb,
        1e-2,
        micro=lambda: optax.chain(
            optax.scale_by_adam(eps=1e-6), optax.scale_by_trust_ratio()
        ),
    ),
    "NovoGrad": Method(optax.novograd, 1e-2, micro=optax.scale_by_novograd),
    "one rate a tensor": Method(
        lambda lr: optax.chain(_per_tensor(), optax.scale_by_learning_rate(lr)),
        3e-3,
        micro=_per_tensor,
    ),
    "Lion": Method(
        partial(optax.lion, weight_decay=0.0),
        1e-3,
        micro=partial(optax.scale_by_lion, b2=0.99),
    ),
    "Adafactor": Method(
        partial(optax.adafactor, min_dim_size_to_factor=8),
        0.05,
        micro=lambda: optax.chain(
            optax.scale_by_factored_rms(min_dim_size_to_factor=8),
            optax.clip_by_block_rms(1.0),
            optax.scale_by_param_block_rms(),
        ),
    ),
    "SM3": Method(
        # optax.sm3 takes no schedule
        lambda lr: optax.chain(optax.scale_by_sm3(), optax.scale_by_learning_rate(lr)),
        0.1,
        micro=optax.scale_by_sm3,
    ),
    "Muon": Method(contrib.muon, 1e-2),
    "schedule-free (AdamW)": Method(
        lambda lr: contrib.schedule_free_adamw(lr, weight_decay=WEIGHT_DECAY),
        1e-2,
        schedule=lambda rate, num_steps: rate,
        result=contrib.schedule_free_eval_params,
    ),
    **{
        f"AdamW, {name}": Method(
            adamw, 3e-3, schedule, micro=_adam, weight_decay=WEIGHT_DECAY
        )
        for name, schedule in {
            "constant rate": constant,
            "cosine decay": cosine,
            "warm-up and cosine": warm_up_cosine,
            "warm restarts": warm_restarts,
        }.items()
    },
}

BARE, REGULATED, SECOND = "bare", "error_regulate", "second level"


def forms_of(method: Method) -> list[str]:
    """Returns the forms that there are of a method; the first has no protection."""
    return [BARE, REGULATED] + [SECOND] * (method.micro is not None)


def optimizer(method: Method, form: str, num_steps: int, rate: Any = None) -> Any:
    """Returns the optimizer of a method in one of its forms."""
    peak = method.rate if rate is None else rate
    schedule = method.schedule(peak, num_steps)
    if form == BARE:
        return optax.with_extra_args_support(method.make(schedule))
    if form == REGULATED:
        return lo.error_regulate(method.make(schedule))
    assert method.micro is not None
    return lo.lalerg(
        schedule,
        micro=method.micro(),
        weight_decay=method.weight_decay,
        search=False,
    )


def evaluated(method: Method, form: str, state: PyTree, params: PyTree) -> PyTree:
    """Returns the params to evaluate."""
    inner = state if form == BARE else state.inner_state
    return method.result(inner, params)


def applied(form: str, params: PyTree, updates: PyTree, state: PyTree) -> PyTree:
    """Returns the new params."""
    if form == BARE:
        return optax.apply_updates(params, updates)
    return lo.apply_updates(params, updates, state)
