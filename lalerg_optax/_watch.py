"""Watch: counts the interventions of a run, and warns when they pile up."""

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ._checks import check_range
from ._numbers import LARGEST
from ._verdict import Verdict

Block = dict[str, Any]  # scalars of some steps by name, arrays of one length

_STEPS_PER_REVERT = 2
_MAX_HARMS = 10  # in a whole run
_NOT_FINITE = 0.99 * LARGEST


class InterventionWarning(UserWarning):
    """More steps were skipped or reverted than expected: have a look.

    Example:
      >>> import warnings, lalerg_optax as lo
      >>> warnings.simplefilter("error", lo.InterventionWarning)  # stop the run
      >>> warnings.simplefilter("ignore", lo.InterventionWarning)  # or say nothing
    """


class TooManyRejections(RuntimeError):
    """So many steps in a row were skipped or reverted that a run should stop.

    Example:
      >>> import jax.numpy as jnp, optax, lalerg_optax as lo
      >>> tx, params = lo.error_regulate(optax.sgd(0.1)), jnp.ones(2)
      >>> state, recorder = tx.init(params), lo.Recorder(stop_after=5)
      >>> for _ in range(9):
      ...     _, state = tx.update(params, state, params, value=jnp.nan)
      ...     recorder.record(state)
      >>> recorder.flush()
      Traceback (most recent call last):
      lalerg_optax._watch.TooManyRejections: 9 steps in a row were rejected (up to ...
    """


class Watch:
    """Warns of more interventions in a window than expected.

    Args:
      window: steps in which interventions are counted, at least 1.
      max_skips: skips that are allowed in a window, at least 0.
      max_reverts: reverts that are allowed in a window, at least 0.
      stop_after: rejected steps in a row that stop a run, at least 1; None for never.

    Raises:
      ValueError: for an argument outside its range.
    """

    def __init__(
        self, window: int, max_skips: int, max_reverts: int, stop_after: int | None
    ):
        if stop_after is not None:
            check_range("stop_after", stop_after, 1, float("inf"))
        self._stop_after = stop_after
        self._told_of: dict[str, int] = {}
        check_range("window", window, 1, float("inf"))
        check_range("max_skips", max_skips, 0, float("inf"))
        check_range("max_reverts", max_reverts, 0, float("inf"))
        self._window = window
        self._max_skips = max_skips
        self._max_reverts = max_reverts
        self._recent: dict[str, list[Block]] = {}  # of each group
        self._num_steps: dict[str, int] = {}
        self._last_warning: dict[str, int] = {}
        self._warned: set[tuple[str, str]] = set()

    def look(self, block: Block) -> None:
        """Warns where interventions pile up in a window that ends at a new step.

        Also warns once in a run of each kind that recurs, however far apart. Of a
        population, each member is looked at, and the worst is told.

        Raises:
          TooManyRejections: if too many steps in a row were rejected.
        """
        for name in block:
            if name.rpartition("/")[2] == "verdict":
                self._look_at(name.removesuffix("verdict"), block)

    def _look_at(self, group: str, block: Block) -> None:
        rows = is_step(block, group)
        num_new = int(rows.sum())
        if not num_new:
            return
        recent = self._recent.setdefault(group, [])
        recent.append(
            {
                key.removeprefix(group): x[rows]
                for key, x in block.items()
                if key.startswith(group) or key == "step"
            }
        )
        num_known = sum(len(part["step"]) for part in recent)
        while num_known - len(recent[0]["step"]) >= num_new + self._window:
            num_known -= len(recent.pop(0)["step"])
        tail = joined(recent)
        for kind, text in [*self._recurring(group, tail), *_jumps(group, recent[-1])]:
            if (group, kind) not in self._warned:
                self._warned.add((group, kind))
                warnings.warn(text, InterventionWarning, stacklevel=5)
        self._stop(group, recent[-1])
        verdict = tail["verdict"].reshape(num_known, -1)  # steps, members
        num_skips = _sums(verdict == Verdict.SKIP, self._window)
        num_reverts = _sums(verdict == Verdict.REVERT, self._window)
        num_reverts = -(-num_reverts // _STEPS_PER_REVERT)
        is_many = num_skips > self._max_skips
        is_many |= num_reverts > self._max_reverts
        is_many[:-num_new] = False
        first = self._num_steps.get(group, 0) + num_new - num_known
        self._num_steps[group] = first + num_known
        last = self._last_warning.get(group)
        if last is not None:
            numbers = np.arange(first, first + num_known)
            is_many &= (numbers >= last + self._window)[:, None]
        if not is_many.any():
            return
        total = np.where(is_many, num_skips + num_reverts, -1)
        end, member = map(int, np.unravel_index(np.argmax(total), total.shape))
        self._last_warning[group] = first + end
        window = slice(max(0, end + 1 - self._window), end + 1)
        part = {key: _of_member(x[window], member) for key, x in tail.items()}
        counts = int(num_skips[end, member]), int(num_reverts[end, member])
        who = _of(group)
        if verdict.shape[1] > 1:
            num_more = int(is_many.any(axis=0).sum()) - 1
            who += f"member {member} (and {num_more} more): "
        warnings.warn(_warning(who, *counts, part), InterventionWarning, stacklevel=5)

    def _stop(self, group: str, new: Block) -> None:
        """Raises a TooManyRejections if too many new steps in a row were rejected."""
        in_a_row = new.get("num_rejected_in_a_row")
        if self._stop_after is None or in_a_row is None:
            return
        most = int(np.nanmax(in_a_row))
        first = int(new["step"][-1]) - int(np.max(in_a_row[-1]))  # of this streak
        is_told = self._told_of.get(group) == first
        if most >= self._stop_after and not is_told:
            self._told_of[group] = first
            step = int(new["step"][np.argwhere(in_a_row == most)[0][0]])
            raise TooManyRejections(
                f"{_of(group)}{most} steps in a row were rejected (up to step {step}): "
                "going back has not helped, so look at data, loss function and "
                "whatever the optimizer does not see. lalerg_optax.healthy_params "
                "are the last params that were good."
            )

    @staticmethod
    def _recurring(group: str, tail: Block) -> Iterator[tuple[str, str]]:
        """Yields each kind of rejection that recurs in this run, and its warning."""
        last = {
            name: worst(tail[name][-1])
            for name, worst in (("skips_left", np.min), ("num_harmful", np.max))
            if name in tail
        }
        step = int(tail["step"][-1])
        if last.get("skips_left", np.inf) < 1.0:
            yield (
                "norm",
                f"{_of(group)}gradients with a norm that does not fit an ordinary "
                f"loss recur (up to step {step}): the skips for them "
                "are used up, and they are accepted from now on, bounded.",
            )
        if last.get("num_harmful", 0) > _MAX_HARMS:
            yield (
                "harm",
                f"{_of(group)}updates did harm {int(last['num_harmful'])} times (up to "
                f"step {step}), and were undone: look at the learning rate, and at "
                "data that recur.",
            )


def _jumps(group: str, new: Block) -> Iterator[tuple[str, str]]:
    """Yields the leaf that jumped farthest in these steps, if any, and its warning."""
    partner = {n: n.replace("jump", "update_ratio", 1) for n in new}  # not a user's
    jumps = {n: new[n] for n in new if n.startswith("jump") and partner[n] in new}
    if not jumps:
        return
    name = max(jumps, key=lambda name: float(np.nanmax(jumps[name])))
    is_far = jumps[name].reshape(len(new["step"]), -1).max(axis=1) > 0.0
    if is_far.any():
        leaf = name.partition("/")[2]
        yield (
            name,
            f"{_of(group)}params{leaf and f' of {leaf}'} were not where the last "
            f"update sent them (at step {int(new['step'][is_far.argmax()])}). If they "
            "were changed on purpose, say so with lalerg_optax.rebase; otherwise "
            "something behind the optimizer changes updates or params.",
        )


def _of(group: str) -> str:
    return f"of {group.strip('/')}: " if group else ""


def joined(blocks: list[Block]) -> Block:
    """Returns blocks as one; where a name is missing there is NaN."""
    names = dict.fromkeys(["step", *(name for block in blocks for name in block)])

    def column(block: Block, name: str) -> np.ndarray:
        if name in block:
            return block[name]
        shape = next(b[name].shape[1:] for b in blocks if name in b)
        return np.full((len(block["step"]), *shape), np.nan, np.float32)

    return {
        name: np.concatenate([column(block, name) for block in blocks])
        for name in names
    }


def is_step(block: Mapping[str, np.ndarray], group: str = "") -> np.ndarray:
    """Returns at which rows a group took a step: not while it accumulates."""
    prefix = group
    while prefix and f"{prefix}has_updated" not in block:
        prefix = prefix[: prefix.rstrip("/").rfind("/") + 1]  # what is around it
    has_updated = block.get(f"{prefix}has_updated")
    if has_updated is None:
        return np.ones(len(block[f"{group}verdict"]), bool)
    flags = np.asarray(has_updated) != 0  # where nothing was recorded there is NaN
    return flags.reshape(len(flags), -1).any(axis=1)


def _sums(flags: np.ndarray, window: int) -> np.ndarray:
    """Returns how many of the last flags are set, at each of them, along axis 0."""
    total = np.cumsum(flags, axis=0)
    before = np.concatenate([np.zeros((window, *total.shape[1:]), total.dtype), total])
    return total - before[: len(total)]


def _of_member(column: np.ndarray, member: int) -> np.ndarray:
    """Returns what a column has of one member of a population."""
    rows = column.reshape(len(column), -1)
    return rows[:, member if rows.shape[1] > 1 else 0]


def _warning(who: str, num_skips: int, num_reverts: int, part: Block) -> str:
    """Returns the warning for a window: how many interventions, and which signals."""
    is_rejected = np.isin(part["verdict"], (Verdict.SKIP, Verdict.REVERT))

    def error(name: str) -> np.ndarray:
        return part.get(name, np.zeros(len(is_rejected)))

    errors = error("scaled_error"), error("scaled_norm_error")
    is_infinite = np.maximum(*errors) >= _NOT_FINITE
    signals = {
        "what is not finite": is_infinite,
        "the loss": (errors[0] > 1.0) & ~is_infinite,
        "the gradient norm": (errors[1] > 1.0) & ~is_infinite,
    }
    counts = {name: int((flag & is_rejected).sum()) for name, flag in signals.items()}
    ranked = sorted(counts, key=lambda name: -counts[name])
    causes = [
        f"{name} ({_number(counts[name], 'step')})" for name in ranked if counts[name]
    ]
    text = (
        f"{who}"
        f"{_number(num_reverts, 'revert')} and {_number(num_skips, 'skip')} in "
        f"{len(is_rejected)} steps (up to step {int(part['step'][-1])}): protection "
        f"can hide a bug; look at "
        f"{', '.join(causes) or 'the learning rate: the search went back'}."
    )
    gradient = _leading_leaf(part, "grad_norm/", is_rejected)
    if gradient:
        norm = np.nanmax(part[f"grad_norm/{gradient}"][is_rejected])
        size = "one that is not finite" if norm >= _NOT_FINITE else f"up to {norm:.1e}"
        text += f" There the largest gradient was that of {gradient} ({size})."
    if num_reverts:
        text += (
            " If params, data or loss were changed on purpose, say so with "
            "lalerg_optax.rebase."
        )
    is_before = ~is_rejected & np.append(is_rejected[1:], False)
    mover = _leading_leaf(part, "predicted_decrease/", is_before)
    if mover:
        text += f" Just before, the leaf that moved the loss most was {mover}."
    return text


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _leading_leaf(part: Block, prefix: str, rows: np.ndarray) -> str:
    """Returns the leaf that is the largest at most of the rows; ``""`` for none."""
    leaves = [name for name in part if name.startswith(prefix)]
    if not leaves or not rows.any():
        return ""
    values = np.stack([np.nan_to_num(part[name][rows]) for name in leaves])
    winner = np.bincount(values.argmax(axis=0)).argmax()
    return leaves[int(winner)].removeprefix(prefix)
