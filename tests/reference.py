"""The docstrings' equations once more: float64, plain loops, one step at a time.

Written to be compared with and to be read, not to be fast. Parameters, gradients
and updates are flat vectors; every object keeps its state to itself and changes it
in ``update``. Names are those of the package's states.
"""

import math

import numpy as np

ACCEPT, SKIP, REVERT = 0, 1, 2
RESTART = "restart"
LARGEST = 1e37  # how an infinite error shows
MAX_RATE = 2.0**40
FLOAT32_MAX = float(np.finfo(np.float32).max)


def global_norm(vector):
    """Returns the l2 norm; infinite where its square is too large for a float32."""
    square = 0.0
    for x in vector:
        square += float(x) ** 2
    return math.inf if square > FLOAT32_MAX else math.sqrt(square)


class LossHistory:
    def __init__(self, size=128):
        self.size = size
        self.values = []
        self.start_value = 0.0

    def record(self, value):
        if not math.isfinite(value):
            return
        if len(self.values) < min(16, self.size):
            self.start_value = min([*self.values, value])
        self.values.append(value)
        self.values = self.values[-self.size :]

    def centre_and_spread(self):
        if not self.values:
            return 0.0, 0.0
        v = sorted(self.values)
        last = len(v) - 1
        median = v[last // 2]
        upper = v[math.ceil(19 * last / 20)]
        return median, (upper - median) / 1.645


class MicroRate:
    """``scale_by_micro_rate``."""

    def __init__(
        self,
        b1=0.9,
        b2=0.99,
        eps=1e-8,
        eps_root=0.0,
        gradient_share=0.4,
        bias_correction=True,
        initial_scale=0.0,
        tensors=None,
    ):
        """With ``tensors``, the sizes of all tensors, each of them has one rate."""
        self.b1, self.b2, self.eps, self.eps_root = b1, b2, eps, eps_root
        self.gradient_share = gradient_share
        self.bias_correction = bias_correction
        self.initial_scale = initial_scale
        self.tensors = tensors
        self.micro_count = 0
        self.num_micro_held = 0
        self.mu = 0.0
        self.nu = initial_scale

    def squares(self, grads):
        if self.tensors is None:
            return grads**2
        tensors = np.split(grads, np.cumsum(self.tensors)[:-1])
        return np.array([sum(g**2) / len(g) for g in tensors])

    def update(self, grads, params, value, verdict=None, audit=None):
        if verdict is None:
            is_open = math.isfinite(global_norm(grads))
        else:
            is_open = verdict == ACCEPT
        if verdict == REVERT:
            self.mu = np.zeros_like(self.mu)
        if audit == RESTART:
            self.nu = np.full_like(self.nu, self.initial_scale)
            self.micro_count = 0
        if not is_open:
            self.num_micro_held += 1
            return np.zeros_like(params)
        self.micro_count += 1
        weight = 1.0 if self.b2 == 1 else 1 - self.b2
        self.mu = self.b1 * self.mu + (1 - self.b1) * grads
        self.nu = self.b2 * self.nu + weight * self.squares(grads)
        mu, nu = self.mu, self.nu
        if self.bias_correction:
            mu = mu / (1 - self.b1**self.micro_count)
            nu = nu / (1 - self.b2**self.micro_count)
        if self.tensors is not None:
            nu = np.repeat(nu, self.tensors)
        mean = (1 - self.gradient_share) * mu + self.gradient_share * grads
        return mean / (np.sqrt(nu + self.eps_root) + self.eps)


class MacroRate:
    """``scale_by_macro_rate``."""

    def __init__(
        self,
        *,
        search=True,
        anneal=False,
        growth_factor=4.0,
        slow_growth_factor=1.5,
        backoff_factor=0.5,
        good_alignment=0.25,
        audit_every=16,
    ):
        self.search = search
        self.anneal = anneal
        self.growth_factor = growth_factor
        self.slow_growth_factor = slow_growth_factor
        self.backoff_factor = backoff_factor
        self.good_alignment = good_alignment
        self.audit_every = audit_every
        self.macro_rate = 1.0
        self.macro_min_rate = 1.0 / MAX_RATE
        self.macro_growth = 1.0
        self.last_macro_revert = 0
        self.is_searching = search
        self.has_improved = not search  # without a search there is nothing to find
        self.has_failed = False
        self.is_reverting = False
        self.avg_alignment = 0.0
        self.best_alignment = 0.0
        self.window = []
        self.last_window_mean = 0.0
        self.last_window_variance = 0.0
        self.best_window_mean = 0.0
        self.best_window_variance = 0.0
        self.num_macro_steps = 0
        self.num_windows = 0
        self.num_macro_held = 0

    def update(self, updates, params, value, verdict=None, audit=None):
        """Scales the updates.

        ``audit`` is None without a regulator that takes audits. With one, it is the
        alignment at the steps with an audit, `RESTART` where params go back to the
        start, and False at all others.
        """
        if verdict is None:
            loss_is_finite = value is None or math.isfinite(value)
            is_open = loss_is_finite and math.isfinite(global_norm(updates))
        else:
            is_open = verdict == ACCEPT
        was_reverting, self.is_reverting = self.is_reverting, verdict == REVERT
        if not is_open:
            self.num_macro_held += 1
            if self.search and self.is_reverting and not was_reverting:
                self.revert()  # once: two steps, one REVERT
            return np.zeros_like(params)
        if self.search:
            loss = 0.0 if value is None else float(np.clip(value, -1e16, 1e16))
            self.window.append(loss)
            self.num_macro_steps += 1
            if audit is None:
                if len(self.window) >= self.audit_every and value is not None:
                    self.audit_window()
                    self.start_window(value)
            elif audit is not False:
                self.audit_alignment(audit, value)
                self.start_window(value)
        return self.macro_rate * updates

    def mean_and_variance(self):
        """Returns the mean loss of the window, and the variance of that mean."""
        count = len(self.window)
        mean = sum(self.window) / count
        squares = sum((x - mean) ** 2 for x in self.window)
        return mean, squares / ((max(count, 2) - 1) * max(count, 2))

    def audit_window(self):
        if self.num_windows == 0:
            return  # the first window is what the second is compared with
        if not self.is_searching:
            self.steer(-self.good_alignment if self.is_worse() else 0.0, True)
            return
        mean, variance = self.mean_and_variance()
        margin = 2.0 * math.sqrt(variance + self.last_window_variance)
        rise = mean - self.last_window_mean
        if rise < -margin:
            self.has_improved = True
            self.end_search()
        elif rise > margin:
            self.scale(self.backoff_factor**4)
        else:
            self.scale(self.growth_factor**0.5)

    def audit_alignment(self, alignment, value):
        has_moved = alignment != 0.0
        if has_moved:
            is_known = self.best_alignment > 0.0
            old = self.avg_alignment if is_known else alignment
            self.avg_alignment = 0.5 * old + 0.5 * alignment
            self.best_alignment = max(self.best_alignment, self.avg_alignment)
        best = max(self.best_alignment, abs(self.avg_alignment))
        rho = self.avg_alignment / best if best > 0.0 else 1.0
        if not self.is_searching:
            self.steer(rho, value is not None)
        elif not has_moved:
            self.scale(self.growth_factor**rho)
        elif self.avg_alignment <= self.good_alignment * self.best_alignment:
            self.scale(self.backoff_factor ** (1 if self.has_improved else 4))
            if self.has_improved:
                self.end_search()
        elif self.has_improved:
            self.scale(self.growth_factor**rho)
        else:
            self.scale(self.backoff_factor ** (4 if self.has_failed else 2))
            self.has_improved = True
            self.avg_alignment = self.best_alignment = 0.0

    def start_window(self, value):
        mean, variance = self.mean_and_variance()
        is_best = self.num_windows == 0 or mean < self.best_window_mean
        if is_best and value is not None:
            self.best_window_mean, self.best_window_variance = mean, variance
        self.last_window_mean, self.last_window_variance = mean, variance
        self.num_windows += 1
        self.window = []

    def scale(self, factor):
        self.macro_rate = min(max(factor * self.macro_rate, 1 / MAX_RATE), MAX_RATE)

    def steer(self, rho, has_value):
        mean, _ = self.mean_and_variance()
        tilt = rho / self.good_alignment
        is_best = self.num_windows == 0 or mean < self.best_window_mean
        power = 0.5 + tilt if has_value and is_best else min(tilt, 0.0)
        may_fall = self.anneal or (has_value and self.is_worse())
        power = max(power, -1.0 if may_fall else 0.0)
        if power > 0.0:
            power = min(power, 2.0) * self.macro_growth
        share = len(self.window) / self.num_macro_steps
        self.scale(self.slow_growth_factor ** (min(1.0, 8.0 * share) * power))
        mended = self.macro_growth * self.backoff_factor**-share
        self.macro_growth = min(mended, 1.0)

    def is_worse(self):
        """Returns whether the mean loss is clearly above its best."""
        mean, variance = self.mean_and_variance()
        margin = 2.0 * math.sqrt(variance + self.best_window_variance)
        return self.num_windows > 0 and mean - self.best_window_mean > margin

    def revert(self):
        power = 1 if self.has_improved else 4
        steps_since = self.num_macro_steps - self.last_macro_revert
        if not self.is_searching and 8 * steps_since >= self.num_macro_steps:
            power = 0
        self.last_macro_revert = self.num_macro_steps
        lower = self.backoff_factor**power * self.macro_rate
        floor = min(self.macro_min_rate, self.macro_rate)  # a REVERT raises nothing
        self.macro_rate = max(lower, floor)
        self.has_failed = self.has_failed or not self.has_improved
        if not self.is_searching:
            self.macro_growth *= self.backoff_factor
        self.window = []

    def end_search(self):
        self.is_searching = False
        self.macro_min_rate = self.macro_rate / 8.0


class AddDecayedWeights:
    """``optax.add_decayed_weights``."""

    def __init__(self, weight_decay):
        self.weight_decay = weight_decay

    def update(self, updates, params, value, verdict=None, audit=None):
        return updates + self.weight_decay * params


class LearningRate:
    """``optax.scale_by_learning_rate``, of a number or a schedule."""

    def __init__(self, learning_rate):
        self.learning_rate = learning_rate
        self.count = 0

    def update(self, updates, params, value, verdict=None, audit=None):
        rate = self.learning_rate
        if callable(rate):
            rate = rate(self.count)
        self.count += 1
        return -rate * updates


class Momentum:
    """``optax.trace``: with `LearningRate` behind it, ``optax.sgd``."""

    def __init__(self, decay):
        self.decay = decay
        self.trace = 0.0

    def update(self, updates, params, value, verdict=None, audit=None):
        self.trace = updates + self.decay * self.trace
        return self.trace


class Chain:
    """``optax.chain``."""

    def __init__(self, *links):
        self.links = links

    def update(self, updates, params, value, verdict=None, audit=None):
        for link in self.links:
            updates = link.update(updates, params, value, verdict, audit)
        return updates


class ErrorRegulate:
    """``error_regulate``."""

    def __init__(
        self,
        inner=None,
        *,
        params,
        threshold=6.0,
        progress_fraction=0.1,
        patience=32,
        anchor_every=32,
        backoff_factor=0.5,
        recovery_steps=64,
        clip_norm=None,
        audit=False,
    ):
        self.inner = inner
        self.threshold = threshold
        self.progress_fraction = progress_fraction
        self.patience = patience
        self.anchor_every = anchor_every
        self.backoff_factor = backoff_factor
        self.recovery_steps = recovery_steps
        self.clip_norm = clip_norm
        self.audit = audit

        self.loss_history = LossHistory()
        self.norm_history = LossHistory()
        self.avg_value = self.avg_deviation = self.best_value = 0.0
        self.num_averaged = 0
        self.num_rejected_in_row = 0
        self.num_finite_rejected_in_row = 0
        self.restore_pending = False

        self.verdict = ACCEPT
        self.reason = ""  # not in the package: what the tests count
        self.scaled_error = self.scaled_norm_error = self.scaled_drift = 0.0
        self.grad_norm = self.alignment = 0.0
        self.damping = 1.0
        self.num_accepted = self.num_skipped = self.num_reverted = 0
        self.num_audits_passed = 0
        self.evidence = 0.0
        self.num_looks = 0
        self.anchor_age = 0
        self.anchor = params.copy()

    def update(self, grads, params, value):
        """Judges a step, and returns the update."""
        norm = global_norm(grads)
        self.grad_norm = norm if math.isfinite(norm) else LARGEST
        steps_needed = min(max(self.num_accepted // 8, 5), self.anchor_every)
        is_due = self.anchor_age >= steps_needed
        alignment, evidence, num_looks = None, 0.0, 0
        if self.audit and is_due:
            alignment, evidence, num_looks = self.look_back(grads, params)
        is_started = self.num_audits_passed > 0
        audit_failed = alignment is not None and alignment < 0.0 and not is_started
        self.judge(value, norm, audit_failed)
        if self.reason == "failed audit":
            self.alignment = alignment
        if is_due and (self.verdict == ACCEPT or self.reason == "failed audit"):
            self.evidence, self.num_looks = evidence, num_looks

        if self.verdict == ACCEPT:
            return self.accept(grads, params, value, is_due, alignment)
        if self.inner is not None:
            nothing = np.zeros_like(params)
            usable = None if value is None else self.avg_value
            audit = False if self.audit else None
            is_started = self.num_audits_passed > 0
            if self.audit and not is_started and self.restore_pending:
                audit = RESTART
            self.inner.update(nothing, params, usable, self.verdict, audit)
        if self.verdict == SKIP:
            self.num_skipped += 1
            return np.zeros_like(params)
        self.num_reverted += 1
        self.anchor_age = 0
        is_started = not self.audit or self.num_audits_passed > 0
        if self.restore_pending and is_started:  # the first of the two steps
            self.damping = max(self.backoff_factor * self.damping, 2.0**-10)
        return self.anchor - params

    def accept(self, grads, params, value, is_due, alignment):
        """Returns the update of an accepted step, and moves the anchor."""
        self.num_accepted += 1
        errors = (self.scaled_error, self.scaled_norm_error, self.scaled_drift)
        self.anchor_age += 1
        audit = False if self.audit else None
        # before the first good audit, there is no other reason to leave the start
        may_move = not self.audit or self.num_audits_passed > 0 or alignment is not None
        if is_due and may_move and max(errors) < 0.5:
            self.anchor = params.copy()
            self.anchor_age = 1
            if alignment is not None:
                audit = self.alignment = alignment
                self.num_audits_passed += alignment > 0.0

        norm = global_norm(grads)
        if self.clip_norm is not None and norm > self.clip_norm:
            grads = grads * (self.clip_norm / norm)
        updates = grads
        if self.inner is not None:
            updates = self.inner.update(grads, params, value, self.verdict, audit)
        recovery = self.backoff_factor ** (-1.0 / self.recovery_steps)
        self.damping = min(recovery * self.damping, 1.0)
        return self.damping * updates

    def look_back(self, grads, params):
        """Returns the alignment, the evidence gathered so far and from how many looks.

        The alignment is None where there is nothing to see or, before the first good
        audit, as long as all looks together do not tell up from down.
        """
        way_back = self.anchor - params
        lengths = global_norm(grads) * global_norm(way_back)
        if global_norm(grads) == 0.0 or not lengths < math.inf:
            return None, 0.0, 0
        if lengths == 0.0:
            return 0.0, 0.0, 0
        products = grads * way_back
        alignment = float(np.clip(np.sum(products) / lengths, -1.0, 1.0))
        if self.num_audits_passed == 0 and alignment != 0.0:
            noise = math.sqrt(np.sum(products**2))
            significance = np.sum(products) / noise if noise > 0.0 else math.inf
            evidence = self.evidence + float(significance)
            num_looks = self.num_looks + 1
            if abs(evidence) <= 0.99 * math.sqrt(num_looks):
                return None, evidence, num_looks
        return alignment, 0.0, 0

    def judge(self, value, norm, audit_failed):
        """Sets the verdict, and what the next one is based on."""
        loss = 0.0 if value is None else value
        is_finite = math.isfinite(loss) and math.isfinite(norm)

        # the errors of loss and norm, and what an alarm is recorded as
        share = min(1.5 * 1.645 / self.threshold, 1.0)
        median, spread = self.loss_history.centre_and_spread()
        loss_scale = max(
            self.threshold * spread,
            self.progress_fraction * (self.loss_history.start_value - median),
        )
        loss_tolerance = max(loss_scale, 1e-5 * abs(median), 1e-30)
        if loss_scale <= 0.0:
            loss_tolerance = math.inf
        self.scaled_error = self.error(
            self.loss_history, loss, median, loss_tolerance, 16
        )
        loss_alarm = median + share * loss_tolerance
        loss_is_known = len(self.loss_history.values) >= 16 and loss_scale > 0.0

        log_norm = math.nan if math.isnan(norm) or norm == 0.0 else math.log(norm)
        median, spread = self.norm_history.centre_and_spread()
        is_early = len(self.norm_history.values) < 16
        floor = math.log(16.0) if is_early else math.log(4.0)
        norm_tolerance = max(self.threshold * spread, floor)
        self.scaled_norm_error = self.error(
            self.norm_history, log_norm, median, norm_tolerance, 1
        )
        norm_alarm = median + share * norm_tolerance
        norm_is_known = len(self.norm_history.values) >= 1
        norm_is_alarm = self.scaled_norm_error > 1.0
        if norm == 0.0:
            self.scaled_norm_error = 0.0
        if self.inner is None and value is not None:
            self.scaled_norm_error = 0.0 if math.isfinite(norm) else LARGEST

        is_outlier = max(self.scaled_error, self.scaled_norm_error) > 1.0
        is_new_level = is_finite and self.num_finite_rejected_in_row >= self.patience
        if is_new_level:
            self.num_averaged = 0

        # the average after this loss, if it is one to be averaged, and the drift
        avg, deviation, best = self.avg_value, self.avg_deviation, self.best_value
        if is_new_level or not is_outlier:
            mean_weight = 1.0 / (self.num_averaged + 1)
            avg += max(0.05, mean_weight) * (loss - avg)
            deviation += max(0.01, mean_weight) * (abs(loss - avg) - deviation)
            best = avg if self.num_averaged == 0 else min(best, avg)
        self.scaled_drift = 0.0
        if self.num_averaged >= 128:
            drift_tolerance = max(
                4.0 * self.avg_deviation,
                (self.loss_history.start_value - best) / 2.0,
                1e-5 * abs(best),
                1e-30,
            )
            self.scaled_drift = min((avg - best) / drift_tolerance, LARGEST)

        # the verdict
        if self.restore_pending:
            self.verdict, self.reason = REVERT, "revert again"
            self.restore_pending = False
        elif is_new_level:
            self.verdict, self.reason = ACCEPT, "new level"
        elif is_outlier and self.num_rejected_in_row == 1:
            self.verdict, self.reason = REVERT, "second outlier"
        elif is_outlier:
            self.verdict = SKIP
            is_first = self.num_rejected_in_row == 0
            self.reason = "first outlier" if is_first else "outlier after revert"
        elif self.scaled_drift > 1.0:
            self.verdict, self.reason = REVERT, "drift"
        elif audit_failed:
            self.verdict, self.reason = REVERT, "failed audit"
        else:
            self.verdict, self.reason = ACCEPT, ""
        audit_failed = self.reason == "failed audit"

        # what is remembered: averages
        if self.verdict == ACCEPT:
            self.avg_value, self.avg_deviation = avg, deviation
            self.best_value = best + (avg - best) / 1024.0
            self.num_averaged = min(self.num_averaged + 1, 128)
            self.num_rejected_in_row = self.num_finite_rejected_in_row = 0
        else:
            self.num_rejected_in_row += 1
            self.num_finite_rejected_in_row += is_finite
        if self.reason in ("second outlier", "failed audit", "drift"):
            self.restore_pending = True
        if self.reason in ("failed audit", "drift"):
            self.num_averaged = 0

        # what is remembered: windows
        if audit_failed or is_new_level:
            self.loss_history, self.norm_history = LossHistory(), LossHistory()
        if audit_failed:
            return
        if not is_new_level:
            if self.scaled_error > 1.0 and math.isfinite(loss):
                loss = loss_alarm
            if norm_is_alarm and math.isfinite(log_norm):
                log_norm = norm_alarm
            if is_outlier and not loss_is_known:
                loss = math.nan
            if is_outlier and not norm_is_known:
                log_norm = math.nan
        if value is not None:
            self.loss_history.record(loss)
        self.norm_history.record(log_norm)

    @staticmethod
    def error(history, value, median, tolerance, min_values):
        if not math.isfinite(value):
            return LARGEST
        if len(history.values) < min_values:
            return 0.0
        return min(max((value - median) / tolerance, -LARGEST), LARGEST)


def lalerg(
    learning_rate=1e-3,
    *,
    params,
    b1=0.9,
    b2=0.99,
    eps=1e-8,
    weight_decay=1e-4,
    clip_norm=None,
    micro=None,
    search=True,
    threshold=6.0,
    anchor_every=32,
):
    return ErrorRegulate(
        Chain(
            micro or MicroRate(b1, b2, eps),
            AddDecayedWeights(weight_decay),
            MacroRate(search=search, anneal=not callable(learning_rate)),
            LearningRate(learning_rate),
        ),
        params=params,
        threshold=threshold,
        anchor_every=anchor_every,
        clip_norm=clip_norm,
        audit=search,
    )
