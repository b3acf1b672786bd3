"""The docstrings' equations once more: float64, plain loops, one step at a time.

Written to be compared with and to be read, not to be fast. Parameters, gradients
and updates are flat vectors; every object keeps its state to itself and changes it
in ``update``. Names are those of the package's states.
"""

import math
from typing import NamedTuple

import numpy as np

ACCEPT, SKIP, REVERT, BOUND = 0, 1, 2, 3
HEALTHY, SUSPECT, RESTORING, TRIAL, EPISODE, REWINDING = range(6)
START, RESTARTED, SEARCH, STEER = range(4)
LARGEST = 1e37  # how an infinite error shows
MAX_RATE = 2.0**40
FLOAT32_MAX = float(np.finfo(np.float32).max)
FLOAT32_ROOT = float(np.finfo(np.float32).tiny) ** 0.5


class Audit(NamedTuple):
    """What all looks back at an anchor say together."""

    alignment: float
    alignment_error: float
    rise: float = 0.0
    rise_error: float = 0.0
    reach: float = 0.0


class Restart(NamedTuple):
    """Told instead, where params go back to the start of the run."""

    reach: float = 0.0


def global_norm(vector):
    """Returns the l2 norm, as far as the squares are float32 numbers."""
    square = 0.0
    for x in vector:
        square += 0.0 if abs(x) < FLOAT32_ROOT else float(x) ** 2
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
        b2=(0.99, 0.999),
        eps=1e-8,
        eps_root=0.0,
        gradient_share=0.4,
        bias_correction=True,
        initial_scale=0.0,
        tensors=None,
    ):
        """With ``tensors``, the sizes of all tensors, each of them has one rate."""
        self.b1, self.eps, self.eps_root = b1, eps, eps_root
        self.b2, self.last_b2 = b2 if isinstance(b2, tuple) else (b2, b2)
        self.gradient_share = gradient_share
        self.bias_correction = bias_correction
        self.initial_scale = initial_scale
        self.tensors = tensors
        self.micro_count = 0
        self.product = 1.0  # of all decays of the squares
        self.num_micro_held = 0
        self.mu = 0.0
        self.nu = initial_scale

    def squares(self, grads):
        if self.tensors is None:
            return grads**2
        tensors = np.split(grads, np.cumsum(self.tensors)[:-1])
        return np.array([sum(g**2) / len(g) for g in tensors])

    def update(self, grads, params, value, verdict=None, audit=None, is_harmful=False):
        if verdict is None:
            is_open = math.isfinite(global_norm(grads))
        else:
            is_open = verdict in (ACCEPT, BOUND)
        if verdict == REVERT:
            self.mu = np.zeros_like(self.mu)
        if isinstance(audit, Restart):
            self.nu = np.full_like(self.nu, self.initial_scale)
            self.micro_count = 0
            self.product = 1.0
        if not is_open:
            self.num_micro_held += 1
            return np.zeros_like(params)
        self.micro_count += 1
        decay = min(max(self.b2, 1 - 2 / self.micro_count), self.last_b2)
        weight = 1.0 if decay == 1 else 1 - decay
        self.product *= decay
        self.mu = self.b1 * self.mu + (1 - self.b1) * grads
        self.nu = decay * self.nu + weight * self.squares(grads)
        mu, nu = self.mu, self.nu
        if self.bias_correction:
            mu = mu / (1 - self.b1**self.micro_count)
            nu = nu / (1 - self.product)
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
        schedule=lambda count: None,
    ):
        self.schedule = schedule
        self.count = 0  # of the schedule
        self.top_rate = None  # the highest since the rate was found
        self.search = search
        self.anneal = anneal
        self.growth_factor = growth_factor
        self.slow_growth_factor = slow_growth_factor
        self.backoff_factor = backoff_factor
        self.good_alignment = good_alignment
        self.audit_every = audit_every
        self.macro_rate = 1.0
        self.phase = START if search else STEER
        self.avg_alignment = self.best_alignment = 0.0
        self.spread = self.noise = 0.0
        self.avg_rise = self.rise_noise = self.avg_loss = 0.0
        self.start_loss = -LARGEST
        self.room = None  # by how many octaves the rate is too low
        self.num_audits = 0
        self.window = []
        self.loss_variance = 0.0
        self.first_window_mean = self.best_window_mean = 0.0
        self.last_window_mean = self.last_window_variance = 0.0
        self.num_macro_steps = 0
        self.num_windows = 0
        self.num_macro_held = 0

    def update(
        self, updates, params, value, verdict=None, audit=None, is_harmful=False
    ):
        """Scales the updates.

        ``audit`` is None without a regulator that takes audits. With one, it is an
        `Audit` at the steps with an audit, a `Restart` where params go back to the
        start, and False at all others.
        """
        if self.search:
            self.hold(self.schedule(self.count))
        self.count += 1
        if self.search and is_harmful:
            self.harm(getattr(audit, "reach", 0.0))
        if verdict is None:
            loss_is_finite = value is None or math.isfinite(value)
            is_open = loss_is_finite and math.isfinite(global_norm(updates))
        else:
            is_open = verdict in (ACCEPT, BOUND)
        if not is_open:
            self.num_macro_held += 1
            return np.zeros_like(params)
        if self.search:
            self.has_value = value is not None
            if self.has_value and None in self.window[:1]:
                self.window = []  # none of its steps had a loss
            if self.has_value:
                value = float(np.clip(value, -1e16, 1e16))
            self.window.append(value)
            self.num_macro_steps += 1
            start_loss = self.beginning()
            if audit is None:
                if len(self.window) >= self.audit_every and self.has_value:
                    self.audit_window()
            elif hasattr(audit, "alignment"):
                self.audit_alignment(audit)
            if start_loss is not None:
                self.start_loss = start_loss
        return self.macro_rate * updates

    def scale(self, factor):
        self.macro_rate = min(max(factor * self.macro_rate, 1 / MAX_RATE), MAX_RATE)
        self.avg_rise *= factor**2
        self.rise_noise *= factor**4

    def hold(self, base_rate):
        """Makes up for a schedule that grows although the rate was found."""
        if base_rate is None:
            return
        if self.phase == STEER and base_rate > self.top_rate:
            self.macro_rate *= self.top_rate / base_rate
        else:
            base_rate = self.top_rate if self.phase == STEER else base_rate
        self.top_rate = base_rate

    def harm(self, reach):
        if self.phase in (START, RESTARTED):
            factor = min(self.backoff_factor**4, 1e-3 / max(reach, 1e-3))
            self.phase = RESTARTED
        else:
            factor = self.backoff_factor
        self.scale(factor)
        self.window = []

    def beginning(self):
        """Returns the mean of the first losses, less its standard error, when due."""
        is_due = self.has_value and self.num_windows == 0 and len(self.window) == 8
        if not is_due or self.start_loss != -LARGEST:
            return None
        mean, variance = self.mean_and_variance()
        return mean - math.sqrt(variance)

    def mean_and_variance(self):
        """Returns the mean loss of the window, and the variance of that mean.

        Steps without a loss change neither.
        """
        losses = [x for x in self.window if x is not None]
        count = len(self.window)
        mean = sum(losses) / max(len(losses), 1)
        squares = sum((x - mean) ** 2 for x in losses)
        return mean, squares / ((max(count, 2) - 1) * max(count, 2))

    def compare(self):
        """Sets how the window compares with those before it."""
        count = len(self.window)
        mean, variance = self.mean_and_variance()
        is_first = self.num_windows == 0 or self.phase in (START, RESTARTED)
        self.is_first = is_first
        rise = mean - self.best_window_mean
        margin = 2.0 * math.sqrt(2.0 * self.loss_variance / count)
        progress = self.first_window_mean - self.best_window_mean
        pace = count / self.num_macro_steps
        least = 0.01 * pace * (self.first_window_mean - mean)
        is_clear = self.has_value and not is_first and progress > 2.0 * margin
        self.is_best = self.has_value and (is_first or rise < 0.0)
        self.is_worse = self.has_value and not is_first and rise > margin
        is_half = 2.0 * (rise - margin) > progress
        is_rising = mean > self.last_window_mean
        self.is_undone = self.is_worse and is_clear and is_half and is_rising
        self.is_gaining = is_first or -rise > least
        close = min(margin, 2.0 * math.sqrt(2.0 * variance))
        self.is_flat = is_clear and close - rise < least
        self.is_down = mean - self.first_window_mean < -margin

    def finish(self):
        """Remembers the window, and starts another one."""
        if not self.has_value:
            self.window = []
            return
        mean, variance = self.mean_and_variance()
        spread = variance * len(self.window)
        part = 1.0 if self.is_first else self.share
        if self.is_first or (self.was_searching and not self.is_down):
            self.first_window_mean += part * (mean - self.first_window_mean)
        if self.is_first:
            self.loss_variance = spread
        else:
            self.loss_variance += 0.25 * (spread - self.loss_variance)
        if self.is_first or self.is_best:
            self.best_window_mean = mean
        self.last_window_mean, self.last_window_variance = mean, variance
        self.num_windows += 1
        self.window = []

    @property
    def share(self):
        """Of the run so far that the window is."""
        return len(self.window) / self.num_macro_steps

    def audit_window(self):
        self.compare()
        self.was_searching = self.phase <= SEARCH
        mean, variance = self.mean_and_variance()
        margin = 2.0 * math.sqrt(variance + self.last_window_variance)
        rise = mean - self.last_window_mean
        if self.phase == STEER:
            self.steer()
        elif self.num_windows > 0:
            if rise < -margin:
                self.phase = STEER
            elif rise > margin:
                self.lower(is_known=False)
            else:
                self.scale(self.growth_factor**0.5)
                self.phase = SEARCH
        else:
            self.phase = SEARCH
        self.finish()

    def lower(self, is_known):
        """A bad audit before the search is over."""
        if self.phase == SEARCH:
            self.scale(self.backoff_factor ** (1 if is_known else 2))
            self.phase = STEER
        else:
            self.scale(self.backoff_factor**4)

    def audit_alignment(self, audit):
        alignment, error = audit.alignment, audit.alignment_error
        self.compare()
        self.was_searching = self.phase <= SEARCH
        has_moved = alignment != 0.0
        if has_moved:
            self.estimate(alignment, error)
        self.room = self.room_left(audit) if self.has_value else None
        c, best = self.avg_alignment, self.best_alignment
        latest, error = error, 2.0 * math.sqrt(self.noise)
        is_known = best > 0.0
        threshold = self.good_alignment * (best if self.phase >= SEARCH else 0.0)
        is_bad = has_moved and c + error <= threshold
        is_good = not is_bad and has_moved and c - error > threshold
        is_now = alignment - 2.0 * latest > threshold
        if self.phase >= SEARCH and self.is_undone and is_good and is_now:
            # the slope goes on, and the loss is another one: so are the data
            self.first_window_mean = self.best_window_mean = self.mean_and_variance()[0]
            self.avg_loss, self.start_loss = self.first_window_mean, -LARGEST
            self.is_undone = self.is_worse = self.is_flat = False
        is_bad = is_bad or (self.is_undone and self.phase == SEARCH)
        is_good = is_good and not is_bad
        is_unclear = has_moved and is_known and not is_good and not is_bad
        rho = max(c / max(best, abs(c)), 0.0) if is_known else 0.5
        if not has_moved:
            rho = 1.0
        if is_unclear:
            rho /= 2.0
        is_reopened = is_known and self.is_gaining and c - error > 0.5 * best
        is_found = self.is_flat or (is_unclear and c <= threshold)
        if self.phase == STEER and not is_reopened:
            self.steer()
        elif self.phase in (START, RESTARTED):
            if is_good:
                self.scale(self.backoff_factor ** (2 if self.phase == START else 4))
                self.num_audits, self.best_alignment = 0, 0.0
                self.phase = SEARCH
            elif is_bad:
                self.lower(is_known)
            else:
                self.scale(self.growth_factor**rho)
                self.phase = SEARCH
        elif is_bad or (self.phase == SEARCH and is_found):
            self.end_search(is_bad, is_known)
        else:
            self.leap(self.growth_factor**rho)
        self.finish()

    def leap(self, factor):
        """By no more than the rise of the loss leaves room for."""
        self.scale(factor if self.room is None else min(factor, 2.0**self.room))

    def end_search(self, is_bad, is_known):
        is_over = self.is_undone or self.is_flat
        if self.room is not None and self.room >= 1.0 and not is_over:
            self.scale(2.0 ** (0.5 * self.room))  # nothing rises: it goes on
            return
        self.phase = STEER
        cut = self.backoff_factor ** (1 if is_known else 2)
        self.leap(cut if is_bad else 1.0)

    def room_left(self, audit):
        """Returns by how many octaves the rate is too low; takes the audit in."""
        mean, _ = self.mean_and_variance()
        weight = min(1.0, 4.0 * self.share) if self.phase == STEER else 1.0
        self.avg_rise += weight * (audit.rise - self.avg_rise)
        self.rise_noise *= (1.0 - weight) ** 2
        self.rise_noise += (weight * audit.rise_error) ** 2
        if self.num_windows == 0:  # losses may come later than audits
            weight = 1.0
        self.avg_loss += weight * (mean - self.avg_loss)

        deviation = math.sqrt(self.loss_variance)
        span = max(self.num_macro_steps / 4.0, len(self.window))
        first = max(self.first_window_mean, self.start_loss)
        gained = max(first - self.avg_loss, deviation / math.sqrt(span))
        calm = 10.0 * deviation
        deviation = min(max(deviation, 0.01 * gained), 3.0 * gained)
        allowed = 0.7 * math.sqrt(self.share) * math.sqrt(gained * deviation)
        if self.anneal:
            allowed = 2.0 * self.share * min(math.sqrt(gained * deviation), calm)
        error = math.sqrt(self.rise_noise)
        rise = max(self.avg_rise, 0.0) + 0.5 * error
        octaves = -0.5 * math.log2(max(rise, 1e-33) / max(allowed, 1e-30))
        if self.avg_rise < -3.0 * error:
            octaves = max(octaves, 1.0)
        most = math.log2(self.growth_factor)
        return min(max(octaves, -2.0 * most), most)

    def estimate(self, alignment, error):
        """Kalman's filter."""
        noise = error**2
        if self.num_audits == 0:
            drift = (0.25 * abs(alignment)) ** 2
            self.avg_alignment = alignment
            self.spread, self.noise = noise + drift, noise
        else:
            scale = max(self.best_alignment, abs(self.avg_alignment))
            drift = (0.25 * scale) ** 2
            before = self.spread + drift
            gain = before / max(before + noise + drift, 1e-30)
            surprise = (alignment - self.avg_alignment) ** 2
            if surprise > 4.0 * (noise + self.noise):
                gain = max(gain, 0.5)
            self.avg_alignment += gain * (alignment - self.avg_alignment)
            self.spread = (1.0 - gain) * before
            self.noise = (1.0 - gain) ** 2 * self.noise + gain**2 * noise
        clear = self.avg_alignment - math.sqrt(self.noise)
        self.best_alignment = max(self.best_alignment, min(clear, 0.999))
        self.num_audits += 1

    def steer(self):
        if self.is_undone:
            self.scale(self.backoff_factor)
            return
        c, best = self.avg_alignment, self.best_alignment
        if self.num_audits == 0 or best >= 1.0:  # the loss is all that is known
            power = -1.0 if self.is_worse else 0.0
            power = 1.0 if self.is_best and self.is_gaining else power
        elif self.room is None:
            rho = c / max(best, abs(c) + 2.0 * math.sqrt(self.noise), 1e-30)
            power = 2.0 * (rho - (0.15 if self.anneal else -0.2))
            power = min(max(power, -1.0), 1.0)
        else:
            power = self.room / math.log2(self.slow_growth_factor)
            most = (-0.5 if self.anneal else 0.0) if self.is_flat else 0.5
            power = min(max(power, -4.0), most)
        weight = min(1.0, 4.0 * self.share)
        self.scale(self.slow_growth_factor ** (weight * power))


class AddDecayedWeights:
    """``optax.add_decayed_weights``."""

    def __init__(self, weight_decay):
        self.weight_decay = weight_decay

    def update(
        self, updates, params, value, verdict=None, audit=None, is_harmful=False
    ):
        return updates + self.weight_decay * params


class LearningRate:
    """``optax.scale_by_learning_rate``, of a number or a schedule."""

    def __init__(self, learning_rate):
        self.learning_rate = learning_rate
        self.count = 0

    def update(
        self, updates, params, value, verdict=None, audit=None, is_harmful=False
    ):
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

    def update(
        self, updates, params, value, verdict=None, audit=None, is_harmful=False
    ):
        self.trace = updates + self.decay * self.trace
        return self.trace


class Chain:
    """``optax.chain``."""

    def __init__(self, *links):
        self.links = links

    def update(
        self, updates, params, value, verdict=None, audit=None, is_harmful=False
    ):
        for link in self.links:
            updates = link.update(updates, params, value, verdict, audit, is_harmful)
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
        self.doubt = self.peak_doubt = self.harmless_doubt = 0.0
        self.ceiling = self.ceiling_in_doubt = -LARGEST
        self.skips_left = 5.0
        self.num_hard = 0
        self.conduct = HEALTHY
        self.has_value = True

        self.verdict = ACCEPT
        self.events = set()  # not in the package: what the tests count
        self.scaled_error = self.scaled_norm_error = self.grad_norm = 0.0
        self.avg_value = 0.0
        self.num_averaged = 0
        self.damping_factor = 1.0
        self.num_well = 0
        self.num_accepted = self.num_bounded = 0
        self.num_skipped = self.num_revert_steps = 0
        self.row = 0  # of steps that are not finite
        self.num_lost = 0  # in rows that ended by themselves
        self.num_trials = self.num_harmful = self.num_audits_passed = 0

        self.looks = []  # those at this anchor
        self.rises = []  # of the loss, at each of them
        self.look_variance = 0.0
        self.alignment_scale = 0.0
        self.alignment = self.alignment_error = 0.0
        self.anchor_age = 0
        self.anchor = params.copy()

    def update(self, grads, params, value):
        """Judges a step, and returns the update."""
        self.events = set()
        self.measure(value, global_norm(grads))
        self.decide()
        audit = self.look(grads, params)
        self.remember()
        updates = self.hand_down(grads, params, value, audit)
        if self.verdict == SKIP:
            return np.zeros_like(params)
        if self.verdict == REVERT:
            return self.anchor - params
        return self.damping_factor * updates

    # ---- errors

    def measure(self, value, norm):
        """Compares loss and norm with those before."""
        self.last_error = self.error
        self.was_before = self.conduct in (HEALTHY, SUSPECT)
        self.was_episode = self.conduct == EPISODE
        self.has_value = value is not None
        self.loss = 0.0 if value is None else value
        if math.isfinite(self.loss):
            self.loss = min(max(self.loss, -LARGEST), LARGEST)
        self.norm = norm
        self.grad_norm = norm if math.isfinite(norm) else LARGEST
        self.is_usable = math.isfinite(self.loss) and math.isfinite(norm)

        m, s = self.loss_history.centre_and_spread()
        scale = max(
            self.threshold * s,
            self.progress_fraction * (self.loss_history.start_value - m),
        )
        self.loss_is_known = len(self.loss_history.values) >= 16 and scale > 0.0
        self.loss_tolerance = max(scale, 1e-5 * abs(m))
        self.loss_median = m
        progress = max(self.loss_history.start_value - m, 0.0)
        self.is_undone = not self.loss - m <= 0.5 * progress  # of NaN, too
        self.scaled_error = self.rise(
            self.loss, m, self.loss_tolerance, self.loss_is_known
        )

        m, s = self.norm_history.centre_and_spread()
        is_early = len(self.norm_history.values) < 16
        floor = math.log(16.0) if is_early else math.log(4.0)
        self.log_norm = math.log(norm) if norm > 0.0 else math.nan
        self.norm_is_known = len(self.norm_history.values) >= 1
        self.norm_tolerance = max(self.threshold * s, floor, self.ceiling - m)
        self.norm_median = m
        self.norm_rise = 0.0
        if norm != 0.0:
            self.norm_rise = self.rise(
                self.log_norm, m, self.norm_tolerance, self.norm_is_known
            )
        self.norm_is_judged = self.inner is not None or value is None
        self.scaled_norm_error = self.norm_rise
        if not self.norm_is_judged and math.isfinite(norm):
            self.scaled_norm_error = 0.0

        # where there is no loss, the norm takes its place
        can_skip = self.skips_left >= 1.0
        norm_is_large = self.is_usable and self.scaled_norm_error > 1.0
        if value is None:
            self.is_high = self.is_undone = norm_is_large and not can_skip
            self.is_odd = norm_is_large and can_skip
        else:
            self.is_high = self.is_usable and self.scaled_error > 1.0
            self.is_odd = norm_is_large and not self.is_high
        self.is_skipped = not self.is_usable or (self.is_odd and can_skip)

    @staticmethod
    def rise(signal, median, tolerance, is_known):
        if not math.isfinite(signal):
            return LARGEST
        if not is_known:
            return 0.0
        return min(max((signal - median) / tolerance, -LARGEST), LARGEST)

    @property
    def error(self):
        """Returns the error that is evidence against the params."""
        return self.scaled_error if self.has_value else self.scaled_norm_error

    # ---- doubt and conduct

    def decide(self):
        """Sets verdict and conduct."""
        self.is_new_revert = self.is_harmful = self.is_new_level = False
        self.is_over = False  # whether nothing is in doubt any more
        self.last_doubt, self.conduct_before = self.doubt, self.conduct
        self.has_taken = self.peak_doubt > 0.0
        if self.conduct == RESTORING:
            self.verdict, self.conduct = REVERT, TRIAL
            return
        if self.conduct == REWINDING:
            self.verdict, self.conduct = REVERT, HEALTHY
            return

        if self.is_usable:
            evidence = min(max(self.error, 0.0), 1.0)
            self.doubt = max(0.0, self.doubt + evidence - 0.25)
        elif self.share_lost() <= 0.01:
            self.doubt += 0.75
        if self.is_skipped:
            self.verdict = SKIP
            self.events.add("odd" if self.is_usable else "not finite")
        elif self.is_high or self.is_odd:
            self.verdict = BOUND
            self.events.add("high" if self.is_high else "odd, bounded")
        else:
            self.verdict = ACCEPT
        is_fine = self.is_usable and self.error < 0.5
        is_long = self.num_hard >= self.patience
        is_last = is_long and self.num_hard < self.patience + 1 and self.is_undone
        usual = 2.0 * self.harmless_doubt + 0.75
        most = 1.5 * self.patience
        has_ended = self.is_usable and self.last_error > 1.0
        has_ended = has_ended and self.error < max(self.last_error / 16.0, 0.5)

        if self.conduct in (HEALTHY, SUSPECT):
            is_due = self.doubt >= max(1.25, min(usual, most))
            if not self.is_usable:
                is_due = self.share_lost() <= 0.01 and self.doubt >= 1.25
                is_due = is_due or self.is_lost()
            is_settled = self.is_usable and self.doubt >= most and not self.is_undone
            if is_due and is_settled:
                self.settle()
            elif is_due:
                self.go_back(RESTORING, "trial")
            elif self.doubt == 0.0:
                self.conduct, self.is_over = HEALTHY, True
            elif self.doubt > 0.5:
                self.conduct = SUSPECT
        elif self.conduct == TRIAL:
            clipped = [min(max(e, -1.0), 1.0) for e in (self.last_error, self.error)]
            if is_fine and sum(clipped) / 2.0 < 0.25:
                # one that was hard at the anchor already is no harm
                self.is_harmful = not is_long and self.num_accepted > 0
                self.events.add("late relief" if is_long else "harm")
                self.conduct, self.is_over = HEALTHY, True
            elif self.is_usable and is_long:
                self.settle()
            else:
                self.events.add("episode")
                self.conduct = EPISODE
                self.num_hard += 1
                # what is the same at the anchor was no harm so far
                self.harmless_doubt = max(self.harmless_doubt, self.peak_doubt)
        elif has_ended and self.doubt >= usual and self.peak_doubt > 0.0:
            self.conduct, self.is_over = HEALTHY, True
            self.go_back(REWINDING, "rewind")
        elif is_fine:
            self.events.add("learnt")
            self.conduct, self.is_over = HEALTHY, True
        elif is_last and self.peak_doubt > 0.0:
            self.go_back(RESTORING, "trial, again")
        elif is_long and not is_last and self.is_usable:
            self.settle()
        else:
            self.num_hard += 1

    def share_lost(self):
        """Returns the share of steps that were not finite by chance."""
        return self.num_lost / (self.num_accepted + self.num_lost + 8)

    def is_lost(self):
        """Returns whether so many NaN in a row are no chance."""
        length = math.log(1e-4) / math.log(max(self.share_lost(), 1e-30))
        return self.row + 1 >= max(2.0, min(length, self.patience))

    def settle(self):
        self.verdict, self.conduct = ACCEPT, HEALTHY
        self.events.add("new level")
        self.is_new_level = self.is_over = True

    def go_back(self, conduct, event):
        self.verdict, self.conduct = REVERT, conduct
        self.is_new_revert = True
        self.num_trials += conduct == RESTORING
        self.events = {event}

    # ---- looks back

    def look(self, grads, params):
        """Looks back at the anchor and moves it; returns what links are told."""
        self.is_failed = self.is_moved = False
        self.is_started = not self.audit or self.num_audits_passed > 0
        shortest = min(max(self.num_accepted // 8, 5), self.anchor_every)
        longest, num_wanted = shortest, 3
        if self.audit:  # noisy looks need a longer way to look back on
            noise = self.look_variance / max(self.alignment**2, 1e-12)
            wanted = min(16.0 * noise, 1e6)
            longest = min(max(int(5 * wanted), shortest), self.anchor_every)
            noise = self.look_variance / max(self.alignment_scale**2, 1e-12)
            least = int(5 * min(3.0 * noise, 1e6))
            shortest = min(max(least, shortest), longest)
            num_wanted = max(min(int(wanted), longest - 1), 3)
        is_healthy = max(self.scaled_error, self.scaled_norm_error) < 0.5
        may_move = self.verdict == ACCEPT and self.conduct == HEALTHY
        may_move = may_move and is_healthy and self.anchor_age >= shortest
        taken = False
        if not self.audit:
            taken = None
            self.is_moved = may_move
        elif self.is_applied and self.anchor_age >= max(shortest - num_wanted, 1):
            self.is_late = self.anchor_age >= longest
            taken = self.look_back(grads, params, may_move, num_wanted)
        if self.is_failed:
            self.go_back(REWINDING, "failed audit")
            self.is_harmful = self.is_over = True
        if self.is_moved:
            # an entry whose square overflows is not copied
            sound = np.square(params) <= FLOAT32_MAX
            self.anchor = np.where(sound, params, self.anchor)
        if self.audit and self.is_new_revert and not self.is_started:
            taken = Restart(self.reach if self.is_failed else 0.0)
        return taken

    @property
    def is_applied(self):
        return self.verdict in (ACCEPT, BOUND)

    def look_back(self, grads, params, may_move, num_wanted):
        alignment = self.alignment_with(grads, params)
        if alignment is not None:
            excess = math.log(global_norm(grads)) - self.norm_median
            most = min(max(self.norm_tolerance, math.log(16.0)), 20.0)
            weight = math.exp(max(min(excess, most), -20.0))
            self.looks.append((weight * self.anchor_age, alignment))
            most = max(self.norm_tolerance, math.log(16.0))
            bound = math.exp(min(most - excess, 0.0))
            length = global_norm(grads) * global_norm(params - self.anchor)
            self.rises.append(-alignment * bound * length)
        n = len(self.looks)
        total = sum(weight for weight, _ in self.looks)
        mean = sum(weight * look for weight, look in self.looks) / total if n else 0.0
        variance = self.look_variance
        if n >= 2:
            rests = [weight * (look - mean) * n / total for weight, look in self.looks]
            own = sum(rest**2 for rest in rests) / (n - 1)
            variance = 0.75 * variance + 0.25 * own if variance > 0.0 else own
        error = math.sqrt(variance / max(n, 1))

        self.reach = 0.0
        is_enough = total**2 > 2.5 * sum(weight**2 for weight, _ in self.looks)
        if self.is_started:
            is_told = self.is_late or (is_enough and abs(mean) > 4.0 * error)
            may_move = may_move and is_told
        else:
            is_still = alignment is not None and not any(x for _, x in self.looks)
            reach = self.reach_of(params)
            is_far = 1e-2 < reach < math.inf and self.num_revert_steps < 4
            is_bad = is_enough and mean < -3.0 * error and self.num_revert_steps < 16
            self.is_failed = is_bad or is_far
            is_clear = (is_enough and mean > 2.0 * error) or n >= 16 or is_still
            may_move = may_move and is_clear and not self.is_failed
            self.reach = reach if self.is_failed else 0.0
        self.is_moved = may_move
        is_held = self.is_started and n >= num_wanted + 5
        if not (self.is_failed or self.is_moved or is_held):
            return False
        rises, count = self.rises, max(n, 1)
        rise = sum(rises) / count
        scatter = max(sum(x**2 for x in rises) - count * rise**2, 0.0)
        rise_error = math.sqrt(scatter / count / max(count - 1, 1))
        self.looks, self.rises, self.look_variance = [], [], variance
        if self.is_failed or n > 0:
            self.alignment, self.alignment_error = mean, error
            scale = abs(mean) - error
            self.alignment_scale = max(scale, 0.75 * self.alignment_scale)
        if self.is_failed or n == 0:
            return False
        self.num_audits_passed += mean > 0.0
        self.events.add("audit")
        return Audit(mean, error, rise, rise_error)

    def reach_of(self, params):
        """Returns how far params are from the anchor, in units of its norm."""
        size = global_norm(self.anchor)
        return global_norm(params - self.anchor) / size if size > 0.0 else 0.0

    def alignment_with(self, grads, params):
        """Returns the cosine; None where there is nothing to see."""
        way_back = self.anchor - params
        norm = global_norm(grads)
        length = norm * global_norm(way_back)
        if norm == 0.0 or not length < math.inf:
            return None
        cosine = np.sum(grads * way_back) / length if length > 0.0 else 0.0
        return float(np.clip(cosine, -1.0, 1.0))

    # ---- what is remembered

    def remember(self):
        is_applied = self.verdict in (ACCEPT, BOUND)

        if self.verdict == ACCEPT:
            known = 0 if self.is_new_level else self.num_averaged
            weight = max(0.05, 1.0 / (known + 1))
            self.num_averaged = known + 1
            self.avg_value += weight * (self.loss - self.avg_value)

        is_again = self.num_harmful > 0 and self.num_well >= 16
        is_again = is_again and self.is_new_revert and self.conduct == RESTORING
        is_again = is_again and not self.was_episode and not self.is_undone
        if is_again:
            longer = 16.0 * self.peak_doubt
            self.harmless_doubt = max(self.harmless_doubt, longer)
        # n steps after the last harm, (n / recovery_steps)^2 cuts are made good
        cut = max(self.backoff_factor * self.damping_factor, 2.0**-10)
        if is_applied:
            before = (self.num_well / self.recovery_steps) ** 2
            self.num_well += 1
            made_good = (self.num_well / self.recovery_steps) ** 2 - before
            self.damping_factor = min(
                self.damping_factor * self.backoff_factor**-made_good, 1.0
            )
        if self.is_failed:
            self.num_averaged = 0
        if self.is_harmful:
            self.num_harmful += not self.is_failed
            self.num_well = 0
            if self.is_started:
                self.damping_factor = cut

        if is_applied:
            self.skips_left = min(self.skips_left + 1.0 / 16384.0, 5.0)
        elif self.verdict == SKIP and self.is_odd:
            self.skips_left -= 1.0

        # doubt, and the norms of steps that are in doubt
        if self.is_over:
            if not self.is_harmful:
                self.harmless_doubt = max(self.harmless_doubt, self.peak_doubt)
                if not self.is_new_revert:
                    self.ceiling = max(self.ceiling, self.ceiling_in_doubt)
            if self.is_new_level:
                self.harmless_doubt = LARGEST
            self.doubt = self.peak_doubt = 0.0
            self.num_hard = 0
        elif is_applied and self.doubt > self.last_doubt:
            self.peak_doubt = max(self.peak_doubt, self.doubt)
        self.bound = self.log_limit()
        if self.is_over or self.verdict == REVERT:
            self.ceiling_in_doubt = -LARGEST
        if self.verdict == BOUND and self.norm > 0.0:
            growth = math.log(1.25) if self.is_high else 0.0
            tried = min(self.log_norm, self.bound + growth)
            self.ceiling_in_doubt = max(self.ceiling_in_doubt, tried)

        self.num_accepted += is_applied
        self.num_bounded += self.verdict == BOUND
        self.num_skipped += self.verdict == SKIP
        is_lost = self.verdict == SKIP and not self.is_usable
        if is_applied and self.conduct_before in (HEALTHY, SUSPECT):
            self.num_lost += self.row
        self.row = self.row + 1 if is_lost else 0
        self.num_revert_steps += self.verdict == REVERT
        self.anchor_age += is_applied
        if self.is_moved:
            self.anchor_age = 1
        if self.verdict == REVERT:
            self.anchor_age = 0
        if self.verdict == REVERT or self.is_new_level:
            self.looks, self.rises = [], []
        self.record()

    @property
    def share(self):
        """Returns what of the tolerance an alarm is remembered as."""
        return min(1.5 * 1.645 / self.threshold, 1.0)

    def remembered_loss(self):
        """Returns the loss; that of an alarm is clipped."""
        is_alarm = self.loss_is_known and self.scaled_error > 1.0
        if is_alarm and math.isfinite(self.loss):
            return self.loss_median + self.share * self.loss_tolerance
        return self.loss

    def record(self):
        """Records loss and norm in their windows; an alarm is clipped."""
        if self.is_failed or self.is_new_level:
            self.loss_history, self.norm_history = LossHistory(), LossHistory()
        if self.is_failed:
            return
        loss, log_norm = self.loss, self.log_norm
        if not self.is_new_level:
            loss = self.remembered_loss()
            is_alarm = self.norm_is_known and self.norm_rise > 1.0
            if is_alarm and math.isfinite(log_norm):
                log_norm = self.norm_median + self.share * self.norm_tolerance
            if (self.is_high or self.is_odd) and not self.loss_is_known:
                loss = math.nan
            if (self.is_high or self.is_odd) and not self.norm_is_known:
                log_norm = math.nan
        if not (self.was_before or self.is_new_level):
            return
        if self.has_value:
            self.loss_history.record(loss)
        self.norm_history.record(log_norm)

    # ---- what links see

    def log_limit(self):
        """Returns the log norm that a bounded gradient may have."""
        if not (self.norm_is_known and self.norm_is_judged):
            return math.inf
        if not self.is_high:
            return self.norm_median + math.log(4.0)
        limit = self.norm_median + max(self.norm_tolerance, math.log(16.0))
        return max(limit, self.ceiling_in_doubt) if self.was_episode else limit

    def hand_down(self, grads, params, value, audit):
        """Returns the updates of the inner transformation."""
        if self.verdict in (ACCEPT, BOUND):
            limit = math.inf if self.clip_norm is None else self.clip_norm
            if self.verdict == BOUND:
                limit = min(limit, np.exp(self.bound))
            if self.norm > limit:
                grads = grads * (limit / self.norm)
            value = self.loss if self.has_value else None
            if self.has_value and self.verdict == BOUND:
                value = self.remembered_loss()
        else:
            grads = np.zeros_like(params)
            value = self.avg_value if self.has_value else None
        if self.inner is None:
            return grads
        is_harmful = self.is_harmful and (self.has_taken or not self.is_started)
        return self.inner.update(grads, params, value, self.verdict, audit, is_harmful)


def lalerg(
    learning_rate=1e-3,
    *,
    params,
    b1=0.9,
    b2=(0.99, 0.999),
    eps=1e-8,
    weight_decay=1e-4,
    clip_norm=None,
    micro=None,
    search=True,
    threshold=6.0,
    anchor_every=32,
):
    schedule = learning_rate if callable(learning_rate) else lambda count: None
    return ErrorRegulate(
        Chain(
            micro or MicroRate(b1, b2, eps),
            AddDecayedWeights(weight_decay),
            MacroRate(
                search=search, anneal=not callable(learning_rate), schedule=schedule
            ),
            LearningRate(learning_rate),
        ),
        params=params,
        threshold=threshold,
        anchor_every=anchor_every,
        clip_norm=clip_norm,
        audit=search,
    )
