"""Recorder: the metrics of a run as arrays."""

import collections
import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ._checks import check_range
from ._monitor import metrics
from ._watch import Block, Watch, joined

_REPORT = ""  # no name of a scalar


class Writer(Protocol):
    """Whatever can write a scalar, such as ``tensorboardX.SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Writes one scalar of one step."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _Report:
    """Metrics in one vector for each dtype, which is quick to make and to fetch."""

    vectors: list[Any]
    names: tuple[tuple[str, ...], ...] = dataclasses.field(metadata={"static": True})


@jax.jit
def _report(opt_state: optax.OptState) -> _Report:
    report = metrics(opt_state)
    kinds: dict[Any, list[str]] = {}
    for name, x in report.items():
        kinds.setdefault(x.dtype, []).append(name)
    vectors = [jnp.stack([report[n] for n in names], -1) for names in kinds.values()]
    return _Report(vectors, tuple(map(tuple, kinds.values())))


def _unpacked(block: Block) -> Block:
    """Returns a block of numpy arrays, in which the report is taken apart."""
    if _REPORT not in block:
        return {name: np.asarray(x) for name, x in block.items()}
    report = block.pop(_REPORT)
    step = block.pop("step")
    scalars = {name: np.asarray(x)[None] for name, x in block.items()}
    for names, vector in zip(report.names, report.vectors, strict=True):
        scalars |= zip(names, np.moveaxis(vector, -1, 0)[:, None], strict=True)
    return scalars | {"step": step}


class Recorder:
    r"""Records the metrics of a run, one entry a step.

    Records stay on the device at first and are fetched in batches, long after the
    device has computed them. So recording does not delay the next steps.

    At each fetch the recorder counts interventions. With more than ``max_skips`` steps
    skipped or more than ``max_reverts`` reverts (of two steps each) in the last
    ``window`` steps it raises a Python warning, an `InterventionWarning`. It says
    which signal objected and, with ``local=True``, in which leaf, and is raised at most
    once in ``window`` steps for each regulator. Protection can hide a bug. Less than 3
    steps in 10,000 are rejected where nothing is wrong; if that happens independently,
    more than 10 in 500 come once in :math:`10^{16}` steps. A search from a rate that is
    far too high does need a few reverts, so the first ones are not reported. With
    ``local=True`` it also names, once in a run, a leaf that was not where the last
    update sent it: one that was reset without `rebase`, or that something behind the
    optimizer changes. Once in a run the recorder also warns that one kind recurs,
    however far apart: gradients of which only the norm is abnormal, when the skips for
    them are used up, and harm, after ten times. While `accumulate` or
    ``optax.MultiSteps`` collect micro-batches, nothing is decided, and nothing counted.

    Args:
      writer: writes each scalar as it is fetched: any object with
        ``add_scalar(tag, value, step)``, such as ``tensorboardX.SummaryWriter(logdir)``
        (``python -m pip install tensorboardX``). Of a population, the mean.
      prefix: of all tags that the writer is given, ``"optimizer/"``, say.
      first_step: number of the first step, for a run that is resumed.
      fetch_every: steps in a batch, at least 1. The last one or two batches are still
        on the device.
      window: steps in which interventions are counted, at least 1.
      max_skips: skips that are allowed in a window, at least 0.
      max_reverts: reverts that are allowed in a window, at least 0.
      stop_after: if given, a `TooManyRejections` is raised once so many steps in a row
        were skipped or reverted, at least 1. It is raised where a batch is fetched, so
        up to two batches later; inside ``jit``, `is_stuck` tells at once.

    Raises:
      ValueError: for an argument outside its range.
      TypeError: if the writer cannot write a scalar.

    Example:
      >>> import jax.numpy as jnp, optax, lalerg_optax as lo
      >>> tx = lo.error_regulate(optax.sgd(0.1))
      >>> params = jnp.array([1.0, -2.0])
      >>> state, recorder = tx.init(params), lo.Recorder()
      >>> for loss in (5.0, jnp.nan, 4.0):
      ...     updates, state = tx.update(params, state, params, value=loss)
      ...     recorder.record(state, loss=loss)
      >>> history = recorder.history()
      >>> history["step"].tolist(), history["verdict"].tolist()
      ([0, 1, 2], [0, 1, 0])

      Save it with ``np.savez(path, **history)``, load it with ``dict(np.load(path))``.
    """

    def __init__(
        self,
        writer: Writer | None = None,
        *,
        prefix: str = "",
        first_step: int = 0,
        fetch_every: int = 100,
        window: int = 500,
        max_skips: int = 10,
        max_reverts: int = 5,
        stop_after: int | None = None,
    ):
        check_range("fetch_every", fetch_every, 1, float("inf"))
        if writer is not None and not hasattr(writer, "add_scalar"):
            raise TypeError(
                "writer must have a method add_scalar(tag, value, step), such as "
                f"tensorboardX.SummaryWriter(logdir), got {writer!r}. To save a run to "
                "a file: np.savez(path, **recorder.history())."
            )
        self._writer = writer
        self._next_step = first_step
        self._fetch_every = fetch_every
        self._prefix = prefix
        self._watch = Watch(window, max_skips, max_reverts, stop_after)
        self._pending: collections.deque[Block] = collections.deque()
        self._num_pending = 0
        self._fetched: list[Block] = []
        self._shapes: dict[str, tuple[int, ...]] = {}

    def record(self, opt_state: optax.OptState = None, /, **scalars: Any) -> None:
        """Records one step.

        Args:
          opt_state: the optimizer's state after the step. It may be donated to the
            next one. None where the step itself returns its metrics:
            ``record(loss=loss, **report)``. Under ``vmap`` it is that of a population,
            and ``history`` has a further axis, that of the members.
          **scalars: other scalars to record, such as the loss. Not every step
            needs to have every name: ``history`` has NaN in the gaps.

        Raises:
          ValueError: if something is not a scalar (one for each member), was one so
            far and is not now, or has a name that the metrics of ``opt_state`` have.
          TypeError: if called inside ``jit``.
        """
        if opt_state is None:
            checked = _checked(scalars, shapes=((),))
            self._check_rows({name: np.shape(x) for name, x in checked.items()})
            self._append(_stacked(checked), 1)
            self._fetch(self._fetch_every)
            return
        _check_concrete("opt_state", *jax.tree.leaves(opt_state))
        report = _report(opt_state)
        members = report.vectors[0].shape[:-1]
        rows = dict.fromkeys(itertools.chain(*report.names), members)
        twice = scalars.keys() & rows
        if twice:
            raise ValueError(
                f"{', '.join(sorted(twice))} of opt_state would be overwritten: record "
                "it under another name."
            )
        checked = _checked(scalars, shapes=((), members))
        self._check_rows(rows | {name: np.shape(x) for name, x in checked.items()})
        self._append({_REPORT: report, **checked}, 1)
        self._fetch(self._fetch_every)

    def extend(self, stacked: Mapping[str, Any] | None = None, /, **more: Any) -> None:
        """Records the steps of a ``jax.lax.scan``.

        Args:
          stacked: outputs of the steps by name, such as `metrics`: arrays whose
            first axis is that of the steps; a second one, that of a population.
          **more: further arrays of that length, such as the losses.

        Raises:
          ValueError: if an array has other axes, or one of another length.
          TypeError: if called inside ``jit``.
        """
        block = _checked({**(stacked or {}), **more}, shapes=None)
        lengths = {name: len(x) for name, x in block.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"all arrays must have one length, got {lengths}.")
        members = {name: x.shape[1] for name, x in block.items() if x.ndim == 2}
        if len(set(members.values())) > 1:
            raise ValueError(
                f"the second axis is that of members of a population, got {members}."
            )
        self._check_rows({name: x.shape[1:] for name, x in block.items()})
        self._append(block, next(iter(lengths.values())))
        self._fetch(self._fetch_every)

    def flush(self) -> None:
        """Fetches and writes all that was recorded; waits for the device."""
        self._fetch(0)

    def history(self) -> dict[str, np.ndarray]:
        """Returns all that was recorded; waits for the device.

        Returns:
          A dict of arrays by name, with an entry for each step; ``"step"`` has the
          numbers of the steps. Where a name was not recorded there is NaN.
        """
        self._fetch(0)
        return joined(self._fetched) if self._fetched else {"step": np.zeros(0, int)}

    def _check_rows(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raises a ValueError where a name had another shape before."""
        for name, shape in sorted(shapes.items() - self._shapes.items()):
            if name in self._shapes:
                raise ValueError(
                    f"{name} had the shape {self._shapes[name]} at earlier steps, and "
                    f"has {shape} now: record one value for each member at every step, "
                    "or one for all; another population needs a Recorder of its own."
                )
        self._shapes |= shapes

    def _append(self, block: Block, length: int) -> None:
        block["step"] = np.arange(self._next_step, self._next_step + length)
        self._next_step += length
        self._pending.append(block)
        self._num_pending += length

    def _fetch(self, num_left: int) -> None:
        """Fetches the oldest steps, if there are twice as many as shall remain.

        Warnings name the line that called the caller of this function.
        """
        if self._num_pending < 2 * num_left:
            return
        taken = []
        while self._pending:
            length = len(self._pending[0]["step"])
            if self._num_pending - length < num_left:
                break
            self._num_pending -= length
            taken.append(self._pending.popleft())
        if not taken:
            return
        blocks = [_unpacked(block) for block in jax.device_get(taken)]
        if self._writer is not None:
            for block in blocks:
                for name in block.keys() - {"step"}:
                    for step, x in zip(block["step"], block[name], strict=True):
                        tag = self._prefix + name
                        self._writer.add_scalar(tag, float(np.mean(x)), int(step))
        self._fetched.append(joined(blocks))
        self._watch.look(self._fetched[-1])


def _check_concrete(name: str, *arrays: Any) -> None:
    if any(isinstance(x, jax.core.Tracer) for x in arrays):
        raise TypeError(
            f"{name} is a tracer: a Recorder works outside of jit. Inside, return "
            "lo.metrics(opt_state) and record what comes out."
        )


def _checked(
    scalars: dict[str, Any], *, shapes: tuple[tuple[int, ...], ...] | None
) -> Block:
    """Returns scalars in buffers that nobody else can donate.

    Args:
      scalars: by name.
      shapes: that they may have; None for stacked ones, with one axis or two.
    """
    kept = {}
    for name, x in scalars.items():
        _check_concrete(name, x)
        kept[name] = jnp.copy(x) if isinstance(x, jax.Array) else np.asarray(x)
        shape = np.shape(kept[name])
        if shapes is None and len(shape) not in (1, 2):
            raise ValueError(
                f"{name} must be an array over steps, or over steps and members of a "
                f"population, got shape {shape}."
            )
        if shapes is not None and shape not in shapes:
            raise ValueError(
                f"{name} must be a scalar, got shape {shape}: take the mean over what "
                "it has one value for."
            )
    return kept


def _stacked(scalars: Block) -> Block:
    """Returns the scalars of one step as arrays over steps."""
    return {name: x[None] for name, x in scalars.items()}
