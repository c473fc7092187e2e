"""``python -m bench``: measure; ``python -m bench readme RESULTS.json``: put a result's table into the README;
``python -m bench report``: what the Triton kernels take of each GPU, compiled here."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console

from bench import measure, report
from bench.cases import CPU_BARS, cpu_cases, quick_cases
from bench.peers import OURS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = main.add_subparsers(dest="command", required=True)
    cpu = commands.add_parser("cpu", help="measure the CPU backend against its peers (the default)")
    cpu.add_argument("--quick", action="store_true", help="a smoke test of a few small cases; no figure to quote")
    cpu.add_argument("--only", metavar="LOSS", nargs="+", help="of: clip, siglip, smartclip, smartclip-sigmoid")
    cpu.add_argument("--max-n", type=int, metavar="N", help="no case larger than this")
    cpu.add_argument("--threads", type=int, metavar="T", help="torch's threads; default: torch's own choice")
    cpu.add_argument(
        "--out",
        type=Path,
        nargs="?",
        const=RESULTS,
        default=ROOT / "build" / "bench",
        help=f"write to OUT/<device>/; without a value {RESULTS.relative_to(ROOT)}, without the option build/bench",
    )
    readme = commands.add_parser("readme", help="write a result's table between the README's markers")
    readme.add_argument("results", type=Path, metavar="RESULTS.json")
    readme.add_argument("--readme", type=Path, default=ROOT / "README.md")
    ahead = commands.add_parser("report", help="compile Triton's kernels for every architecture")
    ahead.add_argument("--out", type=Path, metavar="REPORT.md", help="default: the terminal")
    ahead.add_argument("--quick", action="store_true", help="sm_90 and bfloat16 alone")
    return main


def run_cpu(arguments: argparse.Namespace) -> int:
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    console = Console(width=None if sys.stdout.isatty() else 200, log_path=False)
    about = report.environment()
    console.print(f"{about['device']}, {about['threads']} threads, load {about['load_average']:.2f}")
    cases = quick_cases() if arguments.quick else cpu_cases()
    cases = [case for case in cases if not arguments.only or case.loss in arguments.only]
    cases = [case for case in cases if not arguments.max_n or case.n <= arguments.max_n]
    effort = measure.Effort(product=256, seconds=0) if arguments.quick else measure.Effort()
    rows = []
    for row in measure.run_cases(cases, console.log, effort):
        rows.append(row)
        console.log("  " + "  ".join(cell for cell in report.cells(row)[1:] if cell), highlight=False, markup=False)
    verdicts = [] if arguments.quick else report.judge(CPU_BARS, rows)
    directory = arguments.out / report.slug(about["device"])
    report.write_all(directory, rows, verdicts, about)
    report.print_table(rows, console)
    for verdict in verdicts:
        console.print(str(verdict), highlight=False, style="red" if verdict.met is False else "")
    console.print(f"written: {directory}/results.csv, results.json, time.png, memory.png")
    failed = [row for row in rows if row.subject == OURS and row.status != "ok"]
    for row in failed:
        console.print(f"ours at {row.loss} N={row.n}: {row.status}", style="red", markup=False)
    return 1 if failed else 0


def main(argv: list[str]) -> int:
    asked_for_help = argv[:1] in (["-h"], ["--help"])
    takes_default = not asked_for_help and (not argv or argv[0].startswith("-"))
    arguments = parser().parse_args(["cpu", *argv] if takes_default else argv)
    if arguments.command == "readme":
        report.update_readme(arguments.readme, arguments.results)
        return 0
    if arguments.command == "report":
        from bench import ahead  # needs triton

        return ahead.main(arguments.out, arguments.quick)
    return run_cpu(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
