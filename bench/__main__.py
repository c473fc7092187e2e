"""``python -m bench``: measure on the CPU; ``distributed``: over processes; ``gpu``: on a GPU; ``tune``: find the best
sizes of Triton's blocks on it; ``report``: what kernels take of each GPU, without one; ``caching``: what gradient
caching costs and saves on the CPU; ``prefixes``: Matryoshka prefixes there; ``drop-in``: training steps of other
codebases, as shipped and with the drop-ins; ``readme RESULTS.json``: a table into the README."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from rich.console import Console

from bench import cuda_ahead, distributed, measure, prefixes, readme, report, worker
from bench.cases import CPU_BARS, LOSS_NAMES, Bar, Case, cpu_cases, quick_cases
from bench.gpu_cases import GPU_BARS, gpu_cases, gpu_quick_cases
from bench.peers import OURS, REPLAYED
from bench.rows import Row

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
CPU_EFFORT, CPU_QUICK = measure.Effort(), measure.Effort(product=256, seconds=0)
GPU_EFFORT, GPU_QUICK = measure.Effort(product=8192, seconds=3), measure.Effort(product=256, seconds=0)


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = main.add_subparsers(dest="command", required=True)
    cpu = commands.add_parser("cpu", help="measure the CPU backend against its peers (the default)")
    gpu = commands.add_parser("gpu", help="measure the backends of a GPU against their peers")
    over = commands.add_parser("distributed", help="measure losses over two processes on this CPU against open_clip's")
    over.add_argument("--rounds", type=int, default=7, metavar="R", help="default: 7")
    caching = commands.add_parser("caching", help="measure gradient caching on the CPU, by what it keeps")
    prefixes = commands.add_parser("prefixes", help="measure losses of Matryoshka prefixes on the CPU")
    for measuring in (cpu, gpu, over, caching, prefixes):
        measuring.add_argument("--quick", action="store_true", help="a smoke test of small cases; no figure to quote")
        measuring.add_argument(
            "--out",
            type=Path,
            nargs="?",
            const=RESULTS,
            default=ROOT / "build" / "bench",
            help=f"write to OUT/<device>/; without a value {RESULTS.relative_to(ROOT)}, without the option build/bench",
        )
    for measuring in (cpu, gpu):
        measuring.add_argument("--only", nargs="+", choices=tuple(LOSS_NAMES.values()), help="these losses alone")
        measuring.add_argument("--max-n", type=int, metavar="N", help="no case larger than this")
    for measuring in (cpu, caching, prefixes):
        measuring.add_argument("--threads", type=int, metavar="T", help="torch's threads; default: torch's own choice")
    gpu.add_argument("--seconds", type=float, default=270, help="no case begins later (default: 270)")
    gpu.add_argument("--backend", nargs="+", metavar="NAME", help="default: those that run on the device")
    gpu.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a test of this command itself")
    gpu.add_argument("--alone", action="store_true", help="no peers: only what this library takes, and the floor")
    gpu.add_argument("--bars", nargs="+", choices=GPU_BARS, help="default: those of the backends")
    table = commands.add_parser("readme", help="write a result's table between the README's markers")
    table.add_argument("results", type=Path, metavar="RESULTS.json")
    table.add_argument("--readme", type=Path, default=ROOT / "README.md")
    ahead = commands.add_parser("report", help="what kernels take of a GPU, without one")
    ahead.add_argument("--cuda", action="store_true", help="the CUDA kernels in the installed module, not Triton's")
    ahead.add_argument("--out", type=Path, metavar="REPORT.md", help="default: the terminal")
    ahead.add_argument("--quick", action="store_true", help="sm_90 and bfloat16 alone")
    drop_in = commands.add_parser("drop-in", help="training steps of other codebases, as shipped and with the drop-ins")
    drop_in.add_argument("--quick", action="store_true", help="a smoke test of small cases; no figure to quote")
    drop_in.add_argument("--threads", type=int, metavar="T", help="torch's threads; default: torch's own choice")
    drop_in.add_argument(
        "--out", type=Path, nargs="?", const=RESULTS, default=ROOT / "build" / "bench", help="as cpu's"
    )
    tune = commands.add_parser("tune", help="measure sizes of Triton's blocks on this GPU, rewrite their table")
    tune.add_argument("--arch", metavar="sm_NN", help="whose sizes are rewritten; default: this GPU's")
    tune.add_argument("--seconds", type=float, default=200, help="no kernel is begun later (default: 200)")
    tune.add_argument("--out", type=Path, metavar="TABLES.json", help="default: the backend's own tables.json")
    return main


def chosen(cases: list[Case], arguments: argparse.Namespace) -> list[Case]:
    cases = [case for case in cases if not arguments.only or case.loss in arguments.only]
    return [case for case in cases if not arguments.max_n or case.n <= arguments.max_n]


def console_of() -> Console:
    return Console(width=None if sys.stdout.isatty() else 200, log_path=False)


def log_rows(rows: list[Row], console: Console) -> None:
    for row in rows:
        console.log("  " + "  ".join(cell for cell in report.cells(row)[1:] if cell), highlight=False, markup=False)


def finish(rows: list[Row], bars: list[Bar], about: dict[str, Any], directory: Path, console: Console) -> int:
    """Writes and prints everything; 1 if ours failed anywhere."""
    verdicts = report.judge(bars, rows)
    report.write_all(directory, rows, verdicts, about)
    report.print_table(rows, about, console)
    for verdict in verdicts:
        console.print(str(verdict), highlight=False, style="red" if verdict.met is False else "")
    try:
        from bench.plots import plot
    except ImportError as error:
        console.print(f"no plots: {error}", style="red")
    else:
        plot(directory, rows, about)
    console.print(f"written: {', '.join(sorted(path.name for path in directory.iterdir()))} in {directory}")
    failed = [row for row in rows if row.subject in (OURS, REPLAYED) and row.status not in ("ok", worker.NO_TIME)]
    for row in failed:
        console.print(f"{row.subject} at {row.loss} N={row.n}: {row.status}", style="red", markup=False)
    return 1 if failed else 0


def run_cpu(arguments: argparse.Namespace) -> int:
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    console = console_of()
    about = report.environment()
    console.print(f"{about['device']}, {about['threads']} threads, load {about['load_average']:.2f}")
    cases = chosen(quick_cases() if arguments.quick else cpu_cases(), arguments)
    rows: list[Row] = []
    for row in measure.run_cases(cases, console.log, CPU_QUICK if arguments.quick else CPU_EFFORT):
        rows.append(row)
        log_rows([row], console)
    directory = arguments.out / report.slug(about["device"])
    return finish(rows, [] if arguments.quick else CPU_BARS, about, directory, console)


def run_caching(arguments: argparse.Namespace) -> int:
    from bench import caching  # needs open_clip

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    return caching.main(arguments.out / report.slug(report.device_name()), console_of(), quick=arguments.quick)


def run_prefixes(arguments: argparse.Namespace) -> int:
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    return prefixes.main(arguments.out / report.slug(report.device_name()), console_of(), quick=arguments.quick)


def gpu_backends(device: str) -> list[str]:
    """Those that run there, the preferred one first."""
    from smartclip_kernels import backends

    names = backends.available_backends()
    return [name for name in names if name != "reference" and backends.load(name).runs_on(device)]


def run_gpu(arguments: argparse.Namespace) -> int:
    deadline = monotonic() + arguments.seconds
    console = console_of()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        console.print("python -m bench gpu: torch sees no GPU here", style="red")
        return 2
    found = gpu_backends(arguments.device)
    backends = arguments.backend or found
    if not backends:
        console.print(
            f"no backend runs on {arguments.device!r} here: see python -m smartclip_kernels.info", style="red"
        )
        return 2
    if missing := [name for name in backends if name not in found]:
        console.print(
            f"{', '.join(missing)}: not among those that run on {arguments.device!r} here ({', '.join(found)}): see "
            "python -m smartclip_kernels.info",
            style="red",
        )
        return 2
    effort = GPU_QUICK if arguments.quick else GPU_EFFORT
    about = report.gpu_environment(effort.product) if arguments.device == "cuda" else report.environment()
    console.print(f"{about['device']}, {about.get('driver', 'no driver')}, backends: {', '.join(backends)}")
    cases = gpu_quick_cases(backends, arguments.device) if arguments.quick else gpu_cases(backends)
    cases = chosen(cases, arguments)
    if arguments.alone:
        cases = [replace(case, peers=()) for case in cases]
    bars = [bar for name in arguments.bars or backends for bar in GPU_BARS.get(name, [])]
    bars = [] if arguments.quick else bars
    directory = arguments.out / report.slug(about["device"])
    rows: list[Row] = []

    def start(todo: list[Case]) -> worker.Worker:
        return worker.Process(worker.Job(todo, arguments.device, effort, deadline))

    for of_case in worker.run_cases(cases, start, deadline, console.log):
        rows += of_case
        log_rows(of_case, console)
        report.write_all(directory, rows, report.judge(bars, rows), about)  # what is cut off keeps what it has
    losses = list(LOSS_NAMES.values())
    rows.sort(
        key=lambda row: (losses.index(row.loss), row.dtype, row.d, row.n, backends.index(row.backend or backends[0]))
    )
    return finish(rows, bars, about, directory, console)


def run_distributed(arguments: argparse.Namespace) -> int:
    console = console_of()
    about = report.environment() | {"threads": 1}
    directory = arguments.out / report.slug(about["device"])
    rows: list[distributed.Row] = []
    for of_case in distributed.run(distributed.QUICK if arguments.quick else distributed.CASES, arguments.rounds):
        rows += of_case
        for row in of_case:
            console.log(
                f"  {row.loss} N={row.n} in {row.processes} processes, {row.subject}: "
                f"{report.milliseconds(row.total_ms)} ms, {report.cell(row.times_ours, '.2f')} × ours, "
                f"{row.sent_bytes / 2**20:.1f} MiB sent ({row.sent_percent:.1f} %), {row.status}",
                highlight=False,
                markup=False,
            )
    judged = [] if arguments.quick else distributed.verdicts(rows)
    distributed.write(directory, rows, about, judged)
    for it in judged:
        console.print(
            f"{it['loss']}: {it['measured']:.2f} {it['what']}, bar: {it['bar']}: {'met' if it['met'] else 'MISSED'}"
        )
    console.print(f"written: distributed.csv, distributed.json in {directory}")
    return 0 if all(row.status == "ok" for row in rows if row.subject != distributed.PEER) else 1


def main(argv: list[str]) -> int:
    asked_for_help = argv[:1] in (["-h"], ["--help"])
    takes_default = not asked_for_help and (not argv or argv[0].startswith("-"))
    arguments = parser().parse_args(["cpu", *argv] if takes_default else argv)
    if arguments.command == "readme":
        readme.update(arguments.readme, arguments.results)
        return 0
    if arguments.command == "report":
        if arguments.cuda:
            return cuda_ahead.main(arguments.out)
        from bench import ahead  # needs triton

        return ahead.main(arguments.out, arguments.quick)
    if arguments.command == "drop-in":
        from bench import drop_in  # the codebases are imported case by case

        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        return drop_in.main(arguments.out, arguments.quick)
    if arguments.command == "tune":
        from bench import tune  # needs triton

        return tune.main(arguments.arch, arguments.seconds, arguments.out)
    run = {
        "cpu": run_cpu,
        "distributed": run_distributed,
        "gpu": run_gpu,
        "caching": run_caching,
        "prefixes": run_prefixes,
    }
    return run[arguments.command](arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
