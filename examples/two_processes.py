"""Two processes train one network together; bad data reach only one of them.

The script starts itself twice. The two processes join through `jax.distributed` on
this machine, as they would on two, and share a mesh of their CPU devices: every
process loads its own half of each batch, the weights are the same everywhere. At one
step the rows of process 1 are NaN, and at three steps they are far too large.

What one learns: under plain `jit` with sharded arrays the optimizer needs no
arguments for this. Loss and gradient norm are those of the whole batch, so that both
processes skip, bound or go back at the same step, also the one whose rows were fine,
and their weights stay the same bit for bit.

Run with: python examples/two_processes.py
It takes 20 seconds of processor time (x86), and ends after --timeout in any case.
"""

import argparse
import hashlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from matplotlib.figure import Figure  # not pyplot: nothing needs a display
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from tqdm import tqdm

import lalerg_optax as lo

NUM_PROCESSES = 2
ROWS = 64  # of each process, in each batch
COLORS = ("#E69F00", "#0072B2")
MARKS = {
    lo.Verdict.BOUND: ("#009E73", "bounds the gradient"),
    lo.Verdict.SKIP: ("#777777", "skips the batch"),
    lo.Verdict.REVERT: ("#CC0033", "goes back"),
}


def bad_steps(num_steps: int) -> tuple[range, range]:
    """Returns at which steps process 1 is fed NaN, and at which huge inputs."""
    nan, huge = num_steps // 2, num_steps * 3 // 4
    return range(nan, nan + 1), range(huge, huge + 3)


def load_shard(process: int, num_steps: int, seed: int) -> tuple[np.ndarray, ...]:
    """Returns this process' own rows of every batch; process 1 has bad ones."""
    images, labels = load_digits(return_X_y=True)
    own = np.arange(process, len(labels), NUM_PROCESSES)  # every other image
    rng = np.random.default_rng([seed, process])
    rows = rng.choice(own, (num_steps, ROWS))
    inputs = (images[rows] / 16.0).astype(np.float32)
    if process == 1:
        nan, huge = bad_steps(num_steps)
        inputs[nan] = np.nan
        inputs[huge] *= -300.0
    return inputs, labels[rows].astype(np.int32)


def init_params(key: jax.Array) -> dict[str, jax.Array]:
    """Returns the weights of a perceptron: 64 pixels, 64 units, ten scores."""
    hidden, out = jax.random.split(key)
    return {
        "hidden": jax.random.normal(hidden, (64, 64)) / 8.0,
        "out": jax.random.normal(out, (64, 10)) / 8.0,
    }


def digest(tree: optax.Params) -> str:
    """Returns a hash of all bits that this process has of a tree."""
    shards = [s.data for leaf in jax.tree.leaves(tree) for s in leaf.addressable_shards]
    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in shards)).hexdigest()


def work(process: int, args: argparse.Namespace) -> None:
    """Trains as one of the processes and saves what it was told."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.devices)
    address = f"127.0.0.1:{args.port}"
    jax.distributed.initialize(address, NUM_PROCESSES, process)

    num_devices = jax.device_count()  # of both processes
    mesh = jax.make_mesh((num_devices,), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    tx = lo.lalerg(1e-3)

    def init():
        params = init_params(jax.random.key(args.seed))
        return params, tx.init(params)

    def loss_fn(params, x, y):
        scores = jax.nn.relu(x @ params["hidden"]) @ params["out"]
        losses = optax.softmax_cross_entropy_with_integer_labels(scores, y)
        return losses.mean(), losses

    def train_step(params, opt_state, x, y):  # as on one device: jit does the rest
        (loss, losses), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, x, y)
        updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        params = lo.apply_updates(params, updates, opt_state)
        verdict = lo.metrics(opt_state)["verdict"]
        return params, opt_state, {"loss": loss, "verdict": verdict}, losses

    shardings = (everywhere, everywhere, everywhere, split)
    train_step = jax.jit(train_step, donate_argnums=(0, 1), out_shardings=shardings)
    params, opt_state = jax.jit(init, out_shardings=everywhere)()
    told: dict[str, list] = {"loss": [], "verdict": [], "own_loss": []}
    shard = load_shard(process, args.steps, args.seed)
    steps = zip(*shard, strict=True)
    for own in tqdm(steps, "training", args.steps, disable=process > 0):
        batch = (jax.make_array_from_process_local_data(split, x) for x in own)
        params, opt_state, record, losses = train_step(params, opt_state, *batch)
        record["own_loss"] = np.mean([s.data for s in losses.addressable_shards])
        for name, value in jax.device_get(record).items():
            told[name].append(value)
    np.savez(Path(args.told) / f"{process}.npz", digest=digest(params), **told)


def free_port() -> int:
    """Returns a port on which nobody listens."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def train_joined(args: argparse.Namespace) -> list[dict[str, np.ndarray]]:
    """Runs the processes; returns what each was told at every step."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *sys.argv[1:]]
        command += ["--told", folder, "--port", str(free_port())]
        processes = [
            subprocess.Popen([*command, "--process", str(i)])
            for i in range(NUM_PROCESSES)
        ]
        end = time.monotonic() + args.timeout
        try:  # one that is left alone would wait for the other
            while any(p.poll() is None for p in processes):
                if any(p.poll() for p in processes) or time.monotonic() > end:
                    sys.exit("A process failed, or it took longer than --timeout.")
                time.sleep(0.1)
        finally:
            for p in processes:
                p.kill()
        if any(p.returncode for p in processes):
            sys.exit("A process failed.")
        files = [Path(folder) / f"{i}.npz" for i in range(NUM_PROCESSES)]
        return [dict(np.load(file)) for file in files]


def print_table(told: list[dict[str, np.ndarray]], num_steps: int) -> None:
    """Prints what both processes were told around the bad steps."""
    table = Table(
        title="What the two processes were told",
        caption="own rows: mean loss of the rows that the process has itself; "
        "value: the loss that update was given, of all rows",
    )
    table.add_column("step", justify="right")
    for process in range(NUM_PROCESSES):
        for name in ("own rows", "value", "verdict"):
            table.add_column(f"{name}\nprocess {process}", justify="right")
    for bad in bad_steps(num_steps):
        for step in range(bad.start - 1, bad.stop + 1):
            row = [str(step)]
            for t in told:
                losses = (f"{t[name][step]:.3g}" for name in ("own_loss", "loss"))
                row += [*losses, lo.Verdict(t["verdict"][step]).name]
            table.add_row(*row, end_section=step == bad.stop)
    Console().print(table)


def draw(told: list[dict[str, np.ndarray]], path: str) -> None:
    """Saves the figure: the losses of both processes above their verdicts."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    for process, (t, color) in enumerate(zip(told, COLORS, strict=True)):
        label = f"rows of process {process}"
        top.plot(t["own_loss"], color=color, lw=0.9, label=label)
        for verdict, (mark, label) in MARKS.items():
            steps = np.flatnonzero(t["verdict"] == verdict)
            style = {"color": mark, "ms": 11, "label": label if process else None}
            bottom.plot(steps, np.full(len(steps), process), "|", **style)
    kinds = ("process 1\nis fed NaN ", "process 1: \n inputs x -300 ")
    for steps, kind in zip(bad_steps(len(t["loss"])), kinds, strict=True):
        place = {"ha": "right", "va": "top", "transform": top.get_xaxis_transform()}
        top.text(steps.start, 0.95, kind, size=9, **place)
        for axes in (top, bottom):
            axes.axvspan(steps.start - 1, steps.stop, color="#FFCCCC", lw=0)
    top.set(yscale="log", ylabel="training loss")
    bottom.set(xlabel="step", ylabel="process", yticks=(0, 1), ylim=(1.7, -0.7))
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)


def check(told: list[dict[str, np.ndarray]], num_steps: int) -> None:
    """Ends the script with a message if the run was not what it should be."""
    first, second = told
    (nan,), huge = bad_steps(num_steps)
    if not np.array_equal(first["verdict"], second["verdict"]):
        sys.exit("The processes decided differently.")
    if first["digest"] != second["digest"]:
        sys.exit("The processes ended with different weights.")
    if first["verdict"][nan] != lo.Verdict.SKIP:
        sys.exit("The NaN was not skipped.")
    if not (first["verdict"][huge] != lo.Verdict.ACCEPT).all():
        sys.exit("The huge inputs were not objected to.")
    if not first["loss"][-5:].mean() < first["loss"][:5].mean() / 2:
        sys.exit("The loss did not fall.")
    print("Both processes took the same decisions and have the same weights.")


def main() -> None:
    """Starts the processes, prints the table, saves the figure and checks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=400, help="steps of the run")
    parser.add_argument("--devices", type=int, default=2, help="of each process")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    parser.add_argument("--timeout", type=float, default=300, help="in seconds")
    parser.add_argument("--out", default="two_processes.png", help="file of the figure")
    parser.add_argument("--quick", action="store_true", help="80 steps: a mere trial")
    for name in ("--process", "--port", "--told"):  # for the script itself
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps < 80 or args.devices < 1 or ROWS % args.devices:
        parser.error(f"--steps must be at least 80, --devices a divisor of {ROWS}")
    if args.quick:
        args.steps = 80

    if args.process:
        # the parent may be killed: whoever waits in a collective would never end
        timer = threading.Timer(args.timeout, os._exit, (1,))
        timer.daemon = True
        timer.start()
        work(int(args.process), args)
        return
    told = train_joined(args)
    print_table(told, args.steps)
    draw(told, args.out)
    print(f"The figure is in {args.out}")
    check(told, args.steps)


if __name__ == "__main__":
    main()
