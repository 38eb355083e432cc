"""Does Slide-LoRA harmonise two tasks on one frozen language model? Arms that differ in nothing but the adapter.

    python benchmarks/harmony.py --pilot                    # chooses rate and rank, by a rule that is fixed below
    python benchmarks/harmony.py                            # the arms, five seeds each; then table and plot
    python benchmarks/harmony.py --ablate placement rank experts scaling weight
    python benchmarks/harmony.py --model smollm2 --pilot && python benchmarks/harmony.py --model smollm2

Start a command again after a kill: finished runs are kept, and a run that was cut goes on from its last minute.
docs/harmony.md has the question, the set-up and the results.

What is the same in all arms. Task by task, the samples of step n are a function of (task, seed, n). An arm that trains
one task makes as many steps on the same samples of that task as the arms that train both; an arm that trains both has
the samples of both tasks in each step, and its loss is the sum of what the arms for one task minimise. The adapters
have the same rank in total: three experts of a third of it each. The learning rate is the best one of the arm "both",
which Slide-LoRA has to beat; no other arm has a rate of its own.

The embedded model. Text: read, answer, locate; image: draw, edit; all texts are of 2 to 6 random capitals. Everything
but the adapter is frozen. The language model is that of the embedded weights without experts, but spells in another
alphabet: each capital has the embedding of another one, in what it reads and in what it writes. So it can do neither
task at the start, and both need the same letters: to write those that it sees, and to draw those that it is told.

SmolLM2-135M (--model smollm2). Text against text: to write three words in capitals, or in reverse order.

The rule of the pilot. Its seeds are not used again. First the rate: the one of RATES with which "both" has the lowest
losses (held out, each relative to the lowest found), at the largest rank. Then the ranks in their order, with the arms
for one task and "both": the first counts in which the arms for one task have learnt something (5% to 90% exact;
SmolLM2: 98%) and in which the harm is at least 2% for each seed (SmolLM2: 10%). Harm is the mean over the tasks of
loss("both") / loss(one task) - 1, held out. If none does, the rank with the largest mean harm is taken, and the pilot
says that it found no interference.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from harmony_arms import BOTH, PROBLEMS, Run, train

from textharmony.files import replace_file

RESULTS = Path(__file__).parent / "results" / "harmony"
RANKS = {"embedded": (12, 6, 3), "smollm2": (6, 3)}  # total ranks, to the tightest
RATES = {"embedded": (2e-3, 5e-3, 1e-2), "smollm2": (5e-4, 1e-3, 2e-3)}
PILOT_SEEDS = (100, 101)
LEARNT = {"embedded": (0.05, 0.9), "smollm2": (0.05, 0.98)}  # what share is exact
HARM = {"embedded": 0.02, "smollm2": 0.1}  # the least; held-out losses of SmolLM2 are near 0, and vary by more
DEFAULTS = {"embedded": (100, 16), "smollm2": (40, 8)}  # steps, and samples of a task in a step
ARMS = {"embedded": BOTH, "smollm2": ("both", "table", "sequence")}  # besides those for one task
ABLATIONS: dict[str, tuple[Any, ...]] = {
    "placement": ("vision", "both"),  # instead of "language"
    "rank": (2, 4),  # times the pilot's
    "experts": (2, 6),  # instead of 3
    "scaling": (2.0,),  # instead of 1: gates that add up to 1 halve the scale of the experts that act
    "weight": (0.3, 0.1),  # instead of 1: of the second task's loss
}
# 97.5% quantiles of Student's t by degrees of freedom, from 1 on; the last one counts for more, too.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)

Result = dict[str, Any]


# Runs


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What all results in a folder must have in common."""
    names = ("model", "steps", "batch", "samples")
    return {name: getattr(options, name) for name in names} | {"weights": digest(options)}


def digest(options: argparse.Namespace) -> str:
    """Of the weights that all arms start from."""
    folder = Path(options.weights)
    if options.model == "embedded" and str(folder) == "tiny":
        import textharmony

        folder = Path(textharmony.__file__).parent / "weights" / "tiny"
    files = sorted(folder.glob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16] if files else "package"


def load(run: Run, options: argparse.Namespace) -> Result | None:
    """The result of a run, if it is done; other settings are an error."""
    file = Path(options.out) / run.file
    if not file.exists():
        return None
    result: Result = json.loads(file.read_text())
    if result["run"] != asdict(run) or result["settings"] != settings(options):
        found, wanted = ({**r, **s} for r, s in ((result["run"], result["settings"]), (asdict(run), settings(options))))
        other = {name: value for name, value in found.items() if wanted[name] != value}
        raise SystemExit(
            f"{file} was made with {other}, expected { ({n: wanted[n] for n in other}) }: choose another --out"
        )
    return result


def carry_out(options: argparse.Namespace, run: Run) -> None:
    """Make one run and write its result."""
    problem, file = PROBLEMS[options.model](options), Path(options.out) / run.file
    file.parent.mkdir(parents=True, exist_ok=True)
    model = problem.build(run)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    about = json.dumps({**asdict(run), **settings(options)})
    log = train(problem, model, run, options.steps, file.with_suffix(".part"), about)
    metrics = problem.evaluate(model, run)
    result = {"run": asdict(run), "settings": settings(options), "metrics": metrics, "adapter": trained, "log": log}
    replace_file(file, json.dumps(result).encode())
    file.with_suffix(".part").unlink(missing_ok=True)


def run_all(runs: Sequence[Run], options: argparse.Namespace) -> list[Result]:
    """The results of runs; those that are not there yet are made, `jobs` at a time, each in a process of its own."""
    missing = [run for run in dict.fromkeys(runs) if load(run, options) is None]
    Path(options.out).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        waiting = {pool.submit(work, options, run): run for run in missing}
        try:
            for number, future in enumerate(as_completed(waiting), 1):
                future.result()
                done = load(run := waiting[future], options)
                seconds = sum(row["seconds"] for row in done["log"]) if done else 0
                print(f"[{number}/{len(missing)}] {run.file}: {seconds:.0f} s of steps", flush=True)
        except BaseException as error:
            print(f"{error}\nthe runs that go on end first", flush=True)
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [result for run in runs if (result := load(run, options)) is not None]


def work(options: argparse.Namespace, run: Run) -> None:
    """Let a process of its own make a run, with one thread; raise SystemExit if it fails."""
    told = json.dumps({"options": vars(options), "run": asdict(run)})
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(
        [sys.executable, __file__, "--worker", told], env=environment, stderr=subprocess.PIPE, text=True, check=False
    )
    if found.returncode:
        raise SystemExit(f"{run.file} ended with {found.returncode}:\n{found.stderr[-2000:]}")


# The pilot


def pilot(options: argparse.Namespace) -> None:
    """Choose learning rate and regime by the rule above, and write pilot.json."""
    problem, ranks, rates = PROBLEMS[options.model], RANKS[options.model], RATES[options.model]

    def runs(rank: int, rate: float, arms: Sequence[str], seeds: Sequence[int]) -> list[Run]:
        folder = f"pilot/rank-{rank}-{rate:g}".replace(".", "-")
        return [Run(folder, arm, seed, rank, rate) for seed in seeds for arm in arms]

    rated = run_all([run for rate in rates for run in runs(ranks[0], rate, ["both"], PILOT_SEEDS[:1])], options)
    losses = {result["run"]["rate"]: [result["metrics"][f"{task} loss"] for task in problem.tasks] for result in rated}
    least = [min(column) for column in zip(*losses.values())]
    relative = {rate: sum(loss / low for loss, low in zip(row, least)) for rate, row in losses.items()}
    rate = min(relative, key=lambda rate: relative[rate])
    tried = []
    for rank in ranks:
        results = run_all(runs(rank, rate, [*problem.tasks, "both"], PILOT_SEEDS), options)
        found = {(r["run"]["arm"], r["run"]["seed"]): r["metrics"] for r in results}
        harms = {
            task: [found["both", seed][f"{task} loss"] / found[task, seed][f"{task} loss"] - 1 for seed in PILOT_SEEDS]
            for task in problem.tasks
        }
        exact = {
            task: statistics.mean(found[task, seed][name] for seed in PILOT_SEEDS)
            for task, name in zip(problem.tasks, problem.learnt)
        }
        of_seeds = [statistics.mean(column) for column in zip(*harms.values())]
        low, high = LEARNT[options.model]
        learnt = all(low <= value <= high for value in exact.values())
        tried.append(
            {"rank": rank, "harms": harms, "harm": of_seeds, "exact": exact, "learnt": learnt}
            | {"passed": learnt and min(of_seeds) >= HARM[options.model]}
        )
        print(json.dumps(tried[-1]), flush=True)
        if tried[-1]["passed"]:
            break
    passed = [row for row in tried if row["passed"]]
    best = max(tried, key=lambda row: (row["passed"], row["learnt"], statistics.mean(row["harm"])))
    choice = {"rank": best["rank"], "rate": rate, "interference": bool(passed), "rates": losses, "tried": tried}
    choice |= {
        "settings": settings(options),
        "seeds": PILOT_SEEDS,
        "least harm": HARM[options.model],
        "bounds of exact": LEARNT[options.model],
    }
    replace_file(Path(options.out) / "pilot.json", (json.dumps(choice, indent=2) + "\n").encode())
    if not any(row["learnt"] for row in tried):
        print("no rank is between the bounds of what counts as learnt: use other --steps")
    seen = "interference was seen" if passed else "NO INTERFERENCE was seen"
    print(f"rank {best['rank']}, learning rate {rate:g}; {seen}")


def chosen(options: argparse.Namespace) -> tuple[int, float]:
    """Rank and learning rate: as told, or as a pilot chose."""
    rank, rate = options.rank, options.rate
    if rank is None or rate is None:
        places = [Path(options.out), RESULTS / options.model]
        files = [folder / "pilot.json" for folder in places if (folder / "pilot.json").exists()]
        if not files:
            raise SystemExit(
                f"there is no pilot.json in {options.out}: run with --pilot first, or say --rank and --rate"
            )
        choice = json.loads(files[0].read_text())
        if other := {n: v for n, v in settings(options).items() if choice["settings"][n] != v}:
            before = {name: choice["settings"][name] for name in other}
            raise SystemExit(f"{files[0]} is of {before}, expected {other}: run with --pilot, or say --rank and --rate")
        rank, rate = rank or choice["rank"], rate or choice["rate"]
    return rank, rate


# The report


def compare(results: Sequence[Result]) -> list[dict[str, Any]]:
    """A row for each arm and metric: the mean over seeds, and the mean difference to "both" paired by seed.

    The difference is to "both" in the same folder, or in the core where there is none. The interval is Student's t.
    """
    found = {(r["run"]["folder"], r["run"]["arm"], r["run"]["seed"]): r for r in results}
    rows = []
    for folder, arm in dict.fromkeys(key[:2] for key in found):
        seeds = sorted(seed for of, name, seed in found if (of, name) == (folder, arm))
        base = folder if any(key[:2] == (folder, "both") for key in found) else "core"
        for metric in found[folder, arm, seeds[0]]["metrics"]:
            values = [found[folder, arm, seed]["metrics"][metric] for seed in seeds]
            pairs = [(v, found.get((base, "both", seed))) for v, seed in zip(values, seeds)]
            differences = [value - other["metrics"][metric] for value, other in pairs if other is not None]
            row = {
                "folder": folder,
                "arm": arm,
                "metric": metric,
                "seeds": len(values),
                "mean": statistics.mean(values),
            }
            row |= {"difference": statistics.mean(differences) if differences else None, "half width": None}
            if len(differences) > 1:
                quantile = STUDENT[min(len(differences) - 1, len(STUDENT)) - 1]
                row["half width"] = quantile * statistics.stdev(differences) / len(differences) ** 0.5
            rows.append(row)
    return rows


def trains(arm: str, metric: str, tasks: Sequence[str]) -> bool:
    """Whether an arm was trained for what a metric "TASK loss" or "TASK accuracy" measures."""
    return arm not in tasks or metric.startswith(f"{arm} ")


def mean_of(results: Sequence[Result], key: str) -> float | None:
    """The mean of what the logs say under a name."""
    values = [row[key] for result in results for row in result["log"] if key in row]
    return statistics.mean(values) if values else None


def markdown(results: Sequence[Result], rows: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> str:
    """The tables: losses and accuracies with differences and intervals, gradients, and all metrics."""
    cells = {(row["folder"], row["arm"], row["metric"]): row for row in rows}
    pairs = list(dict.fromkeys((row["folder"], row["arm"]) for row in rows))
    main = [f"{task} {kind}" for kind in ("loss", "accuracy") for task in tasks]

    def cell(folder: str, arm: str, metric: str) -> str:
        if not trains(arm, metric, tasks):
            return ""
        row = cells[folder, arm, metric]
        scale, digits = (100, 1) if metric.endswith("accuracy") else (1, 3)
        text = f"{scale * row['mean']:.{digits}f}"
        if row["difference"] is None or (arm == "both" and row["difference"] == 0):
            return text
        width = "" if row["half width"] is None else f" ± {scale * row['half width']:.{digits}f}"
        return f"{text} ({scale * row['difference']:+.{digits}f}{width})"

    def of(folder: str, arm: str) -> list[Result]:
        return [r for r in results if (r["run"]["folder"], r["run"]["arm"]) == (folder, arm)]

    lines = ["| run | seeds | adapter | " + " | ".join(main) + " |", "|---" * (3 + len(main)) + "|"]
    for folder, arm in pairs:
        found = of(folder, arm)
        values = " | ".join(cell(folder, arm, metric) for metric in main)
        lines.append(f"| {folder} {arm} | {len(found)} | {found[0]['adapter']:,} | {values} |")
    lines += ["", "In brackets: the difference to `both`, paired by seed, with its 95% interval (Student's t).", ""]
    names = ["cosine", *(f"{what} of {task}" for what in ("cosine", "norm") for task in tasks)]
    lines += ["| run | " + " | ".join(names) + " | minutes of steps |", "|---" * (2 + len(names)) + "|"]
    for folder, arm in pairs:
        means = [mean_of(of(folder, arm), name) for name in names]
        minutes = sum(row["seconds"] for r in of(folder, arm) for row in r["log"]) / len(of(folder, arm)) / 60
        values = " | ".join("" if value is None else f"{value:.3f}" for value in means)
        lines.append(f"| {folder} {arm} | {values} | {minutes:.1f} |")
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    lines += ["", "| run | " + " | ".join(metrics) + " |", "|---" * (1 + len(metrics)) + "|"]
    for folder, arm in pairs:
        values = " | ".join(f"{cells[folder, arm, metric]['mean']:.3f}" for metric in metrics)
        lines.append(f"| {folder} {arm} | {values} |")
    return "\n".join(lines) + "\n"


def plot(results: Sequence[Result], rows: Sequence[Mapping[str, Any]], tasks: Sequence[str], file: Path) -> None:
    """Losses while training, differences to "both" with intervals, and cosines of the gradients; of the core."""
    from matplotlib.figure import Figure

    core = [result for result in results if result["run"]["folder"] == "core"]
    arms = list(dict.fromkeys(result["run"]["arm"] for result in core))
    figure = Figure(figsize=(13, 8), layout="constrained")
    axes = figure.subplots(2, 3).ravel()
    for arm in arms:
        logs = [result["log"] for result in core if result["run"]["arm"] == arm]
        for axis, task in zip(axes, tasks):
            if f"{task} loss" in logs[0][0]:
                means = [statistics.mean(log[i][f"{task} loss"] for log in logs) for i in range(len(logs[0]))]
                width = max(1, len(means) // 30)
                smooth = [statistics.mean(means[max(0, i - width) : i + 1]) for i in range(len(means))]
                axis.plot(smooth, label=arm, linewidth=1)
        probes = [i for i, row in enumerate(logs[0]) if "cosine" in row]
        if arm in ("both", "sequence", "full") and probes:
            axes[2].plot(probes, [statistics.mean(log[i]["cosine"] for log in logs) for i in probes], label=arm)
    for axis, title in zip(
        axes, (*(f"{task} loss while training" for task in tasks), "cosine of the tasks' gradients")
    ):
        axis.set(title=title, xlabel="step")
        axis.legend(fontsize=7)
    axes[2].axhline(0, color="grey", linewidth=0.5)
    for axis, metrics in zip(axes[3:], ([f"{tasks[0]} loss"], [f"{tasks[1]} loss"], [f"{t} accuracy" for t in tasks])):
        for offset, metric in enumerate(metrics):
            of = [r for r in rows if r["folder"] == "core" and r["metric"] == metric and r["arm"] != "both"]
            of = [row for row in of if row["difference"] is not None and trains(row["arm"], metric, tasks)]
            places = [arms.index(row["arm"]) + 0.15 * offset for row in of]
            widths = [row["half width"] or 0 for row in of]
            axis.errorbar([row["difference"] for row in of], places, xerr=widths, fmt="o", label=metric)
        axis.axvline(0, color="grey", linewidth=0.5)
        axis.set(title="difference to both, held out", yticks=range(len(arms)), yticklabels=arms)
        axis.legend(fontsize=7)
    figure.savefig(buffer := io.BytesIO(), format="png", dpi=100)
    replace_file(file, buffer.getvalue())


def report(options: argparse.Namespace) -> None:
    """Write results.json, results.csv, results.md and harmony.png from all results of the core and of ablations."""
    out, tasks = Path(options.out), PROBLEMS[options.model].tasks
    files = [*sorted((out / "core").glob("*.json")), *sorted((out / "ablation").glob("*/*.json"))]
    results = [json.loads(file.read_text()) for file in files]
    order = {arm: number for number, arm in enumerate((*tasks, *BOTH))}
    results.sort(
        key=lambda r: (r["run"]["folder"] != "core", r["run"]["folder"], order[r["run"]["arm"]], r["run"]["seed"])
    )
    rows = compare(results)
    short = [{name: value for name, value in result.items() if name != "log"} for result in results]
    replace_file(out / "results.json", json.dumps({"rows": rows, "runs": short}, indent=1).encode())
    table = csv.DictWriter(text := io.StringIO(), list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    replace_file(out / "results.csv", text.getvalue().encode())
    replace_file(out / "results.md", (found := markdown(results, rows, tasks)).encode())
    plot(results, rows, tasks, out / "harmony.png")
    print(found)


# The command


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=list(PROBLEMS), default="embedded")
    parser.add_argument("--pilot", action="store_true", help="choose learning rate and rank")
    parser.add_argument("--ablate", nargs="+", choices=list(ABLATIONS), default=[], help="instead of the core arms")
    parser.add_argument("--arms", nargs="+", help="names of tasks, or some of " + ", ".join(BOTH))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--rank", type=int, help="of the plain LoRA, a multiple of 3; default: as the pilot chose")
    parser.add_argument("--rate", type=float, help="of learning; default: as the pilot chose")
    parser.add_argument("--steps", type=int, help="of each run; default: 100, smollm2 40")
    parser.add_argument("--batch", type=int, help="samples of each task in a step; default: 16, smollm2 8")
    parser.add_argument("--samples", type=float, default=1.0, help="how many held-out samples, relative to the default")
    parser.add_argument("--weights", default="tiny", help="a folder instead of the embedded weights, or of SmolLM2's")
    parser.add_argument("--out", help="default: benchmarks/results/harmony/MODEL")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each with one thread")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    steps, batch = DEFAULTS[options.model]
    options.steps, options.batch = options.steps or steps, options.batch or batch
    options.out = options.out or str(RESULTS / options.model)
    known = (*PROBLEMS[options.model].tasks, *BOTH)
    options.arms = options.arms or [*PROBLEMS[options.model].tasks, *ARMS[options.model]]
    if unknown := [arm for arm in options.arms if arm not in known]:
        parser.error(f"arms has {unknown}, expected some of {', '.join(known)}")
    if "placement" in options.ablate and options.model != "embedded":
        parser.error(f"ablate has 'placement', expected it with --model embedded: {options.model} has no ViT")
    return options


def main() -> None:
    options = parse()
    if options.worker:
        told = json.loads(options.worker)
        return carry_out(argparse.Namespace(**told["options"]), Run(**told["run"]))
    if options.pilot:
        return pilot(options)
    rank, rate = chosen(options)
    core = [Run("core", arm, seed, rank, rate) for seed in options.seeds for arm in options.arms]
    if options.ablate:
        core = []
    for name in options.ablate:
        arms = {"experts": ["sequence"], "scaling": ["both", "table", "sequence"]}.get(name, ["both", "sequence"])
        for value in ABLATIONS[name]:
            changed = {name: round(rank * value) if name == "rank" else value}
            runs = [Run("core", arm, seed, rank, rate) for seed in options.seeds for arm in arms]
            core += [replace(run, folder=f"ablation/{name}-{value}", **changed) for run in runs]
    run_all(core, options)
    report(options)


if __name__ == "__main__":
    main()
