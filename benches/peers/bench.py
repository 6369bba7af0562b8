"""Ours beside other engines: one command that makes everything, measures in turns and prints a table. See ../README.md.

Every engine is a process of its own that answers requests (see peer.py and main.rs); all but the one that is asked are stopped, so
that nothing of theirs runs in its time.
"""

import argparse
import ctypes
import json
import os
import platform
import select
import signal
import statistics
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from install import Peers
from report import write

ROOT = Path(__file__).parent.parent.parent
# Tokens that a decode generates after its first: fewer where each costs more.
MODELS = {"smollm2-135m": 128, "qwen2.5-0.5b": 64, "storyteller": 128}
# A sample is disturbed where the bandwidth beside it is below this part of what the run has seen.
DISTURBED = 0.8
RETAKES = 2
# Seconds that an answer may take.
PATIENCE = 1200
# What the chart and the comparison are about: name, title, rows, length of the prompt, search, hypotheses, whether it reads weights most.
MEASURES = {
    "prefill": ("prefill of 512", 1, 512, "greedy", 1, False),
    "decode": ("decode", 1, 64, "greedy", 1, True),
    "rows": ("four rows", 4, 64, "greedy", 4, True),
    "beams": ("four beams", 1, 64, "beams", 4, True),
    "contrastive": ("contrastive, k = 4", 1, 64, "contrastive", 1, True),
    "long": ("8,192 positions", 1, 8192, "greedy", 1, True),
}
ALONE = ["overhead", "products", "callers"]
CONTRASTIVE = ["ours", "transformers 4"]


@dataclass
class Worker:
    """An engine as a process. It is stopped unless it is asked."""

    name: str
    command: list
    environment: dict
    log: Path
    hello: dict = field(init=False)

    def __post_init__(self) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(self.command, **pipes, stderr=log, env=self.environment, preexec_fn=follow)
        self.hello = self.answer()

    def ask(self, **request) -> dict:
        self.process.send_signal(signal.SIGCONT)
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise ValueError(f"{self.name} has ended") from None
        return self.answer()

    def answer(self) -> dict:
        ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE)
        if not ready:
            self.process.kill()
            raise ValueError(f"no answer in {PATIENCE} s")
        line = self.process.stdout.readline()
        if not line:
            raise ValueError(f"ended, see {self.log}")
        answer = json.loads(line)
        if "error" in answer:
            raise ValueError(answer["error"])
        self.process.send_signal(signal.SIGSTOP)
        return answer

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


class Bench:
    def __init__(self, options: argparse.Namespace):
        self.options, self.peers = options, Peers(options.folder, options.python)
        names = [name for name in options.peers if name != "candle-transformers"]
        if "contrastive" in options.measures and "transformers" in names:
            names.append("transformers-4")
        self.peers.install(names)
        self.driver = options.driver.absolute() if options.driver else build()
        self.threads = {name: str(options.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")}
        self.probe = self.worker("probe", [self.driver, "probe", str(options.threads)], os.environ)
        self.readings: list[float] = []
        self.peaks: list[float] = []
        self.groups: list[dict] = []
        self.alone: list[dict] = []
        self.versions: dict[str, str] = {}
        # A line each.
        self.missing: dict[str, str] = {}
        self.differences: list[str] = []

    def worker(self, name: str, command: list, environment: dict) -> Worker:
        return Worker(name, command, environment | getattr(self, "threads", {}), self.peers.folder / "logs" / f"{name}.log")

    def run(self) -> None:
        for _ in range(5):
            self.bandwidth()
        for model in self.options.models:
            for dtype in self.options.files:
                workers = self.start(model, dtype)
                name = {"model": model, "file": dtype}
                try:
                    self.groups.append(name | {"figures": self.group(model, dtype, workers)})
                    self.alone.append(name | {"figures": self.by_itself(model, dtype, workers["ours"])})
                finally:
                    for worker in workers.values():
                        worker.end()
                # What is measured stays measured, whatever becomes of the rest.
                write(self.results(), self.options.folder)
        self.probe.end()

    def results(self) -> dict:
        machine = {
            "processor": processor(),
            "flags": [flag for flag in FLAGS if flag in flags()],
            "threads": self.options.threads,
            "instructions": self.probe.hello["instructions"],
            "bandwidth": self.readings,
            "peak": self.peaks,
            "kernel": platform.release(),
            "rust": output("rustc", "--version"),
            "commit": output("git", "-C", ROOT, "rev-parse", "--short", "HEAD"),
            "date": time.strftime("%Y-%m-%d"),
        }
        return {
            "machine": machine,
            "turns": self.options.turns,
            "versions": self.versions,
            "groups": self.groups,
            "alone": self.alone,
            "missing": self.missing,
            "differences": self.differences,
        }

    def start(self, model: str, dtype: str) -> dict[str, Worker]:
        """Every engine that a file of this type can be read by, ours first."""
        checkpoint = self.peers.checkpoint(self.driver, model, dtype)
        half = dtype == "bf16" and any(flag in flags() for flag in ("avx512_bf16", "amx_bf16"))
        threads = str(self.options.threads)
        plan = {"ours": ([self.driver, "ours", checkpoint, "f32", threads], None, [])}
        if half:
            plan["ours, dtype bf16"] = ([self.driver, "ours", checkpoint, "bf16", threads], None, [])
        elif dtype == "bf16":
            self.missing["dtype bf16"] = "this processor has neither AVX-512 BF16 nor AMX"
        for peer in self.options.peers:
            if peer == "candle-transformers":
                plan[peer] = ([self.driver, "candle", checkpoint, dtype], None, [])
            elif peer == "openvino":
                plan["openvino" if dtype == "f32" else "openvino, f32 arithmetic"] = ([peer, "f32"], peer, [])
                if half:
                    plan["openvino, bf16 arithmetic"] = ([peer, "bf16"], peer, [])
            else:
                plan[peer] = ([peer, dtype], None if peer == "transformers" else peer, [])
        if "contrastive" in self.options.measures and "transformers" in self.options.peers and model == "smollm2-135m":
            plan["transformers 4"] = (["transformers", dtype], None, ["transformers-4"])
        workers = {}
        for name, (command, converted, overlays) in plan.items():
            try:
                environment = os.environ
                if isinstance(command[0], str):
                    peer, arithmetic = command
                    if reason := self.peers.missing.get("transformers-4" if overlays else peer):
                        raise ValueError(reason)
                    folder = self.peers.converted(peer, checkpoint, dtype) if converted else checkpoint
                    script = Path(__file__).parent / "peer.py"
                    command = [self.peers.python, script, peer, folder, arithmetic, str(self.options.threads)]
                    environment = self.peers.environment(overlays)
                print(f"{model}, {dtype} file: {name}", file=sys.stderr)
                workers[name] = self.worker(name, command, environment)
                self.versions[name.split(",")[0]] = workers[name].hello.get("version", "")
            except ValueError as error:
                if name == "ours":
                    raise
                self.missing[name if str(error) in self.peers.missing.values() else f"{name} ({model}, {dtype})"] = str(error)
        for name in workers:
            if name in ("ours", "candle-transformers"):
                self.versions[name] = package("candle-generate" if name == "ours" else name)
        return workers

    def group(self, model: str, dtype: str, workers: dict[str, Worker]) -> dict:
        """Figures of all engines: {figure: {engine: {values, shares, disturbed}}}."""
        weights, position = workers["ours"].hello["weights"], workers["ours"].hello["position"]
        figures: dict[str, dict] = {}
        if model != "storyteller":
            hellos = {name: worker.hello for name, worker in workers.items() if name != "transformers 4"}
            loading = {name: [(hello["peak"] - hello["before"]) / weights] for name, hello in hellos.items()}
            figures["memory, loading"] = {name: {"values": values, "unit": "x weights"} for name, values in loading.items()}
        for measure in [name for name in MEASURES if name in self.options.measures]:
            title, rows, length, search, lanes, reading = MEASURES[measure]
            if measure in ("long", "contrastive") and model != "smollm2-135m":
                continue
            new = self.options.new or MODELS[model]
            prompts = ids(rows, length, vocab(model))
            able = self.able(measure, model, dtype, workers, prompts)
            turns = min(self.options.turns, 2) if measure == "long" else self.options.turns
            for turn in range(turns):
                for name in able:
                    print(f"{model}, {dtype} file: {title}, turn {turn + 1}, {name}", file=sys.stderr)
                    self.sample(figures, measure, workers[name], prompts, new, weights, position)
        return figures

    def able(self, measure: str, model: str, dtype: str, workers: dict[str, Worker], prompts: list) -> list[str]:
        """The engines that can do it, warm; says where their tokens are not ours."""
        title, rows, _, search, _, _ = MEASURES[measure]
        names = [name for name in workers if name != "transformers 4"]
        if measure == "contrastive":
            names = [name for name in CONTRASTIVE if name in workers]
        if measure == "long":
            # Its attention is quadratic in memory: several copies of 2.4 GB.
            return [name for name in names if name != "candle-transformers"]
        able, reference = [], None
        new = 1 if measure == "prefill" else 16
        for name in names:
            try:
                answer = workers[name].ask(prompts=prompts, new=new, search=search)["ids"][:rows]
            except ValueError as error:
                print(f"{model}, {dtype} file: {title}: {name}: {error}", file=sys.stderr)
                continue
            able.append(name)
            reference = reference or answer
            for row, (ours, theirs) in enumerate(zip(reference, answer)):
                if ours != theirs:
                    at = next(at for at, (a, b) in enumerate(zip(ours, theirs)) if a != b)
                    self.differences.append(f"{model}, {dtype} file, {title}: {name} leaves our path at token {at + 1} of row {row + 1}")
                    break
        return able

    def sample(self, figures: dict, measure: str, worker: Worker, prompts: list, new: int, weights: int, position: int) -> None:
        title, rows, length, search, lanes, reading = MEASURES[measure]
        for attempt in range(1 + RETAKES):
            before = self.readings[-1]
            try:
                taken = self.call(measure, worker, prompts, new, weights, position)
            except ValueError as error:
                figures.setdefault(title, {})[worker.name] = {"values": [], "error": str(error)}
                return
            here = (before + self.bandwidth()) / 2
            disturbed = reading and here < DISTURBED * self.upper()
            if taken and (not disturbed or measure == "long"):
                break
        for figure, (value, unit, steps) in taken.items():
            entry = figures.setdefault(figure, {}).setdefault(worker.name, {"values": [], "shares": [], "disturbed": 0, "unit": unit})
            entry["values"].append(value)
            entry["disturbed"] += disturbed
            # The storyteller is in the caches.
            if steps and weights > 1 << 27:
                # What a step reads: the weights, and each row's keys and values so far.
                read = weights + rows * position * (length + new / 2)
                entry["shares"].append(steps * read / here)

    def call(self, measure: str, worker: Worker, prompts: list, new: int, weights: int, position: int) -> dict:
        """{figure: (value, unit, steps a second or None)}; empty where times make no sense, on a machine with much else to do."""
        title, rows, length, search, lanes, _ = MEASURES[measure]
        if measure == "long":
            answer = worker.ask(prompts=prompts, new=33, search=search)
            steps = 32 / (answer["seconds"] - answer["first"])
            whole = weights + position * (length + 33)
            return {
                "prefill of 8,192": (length / answer["first"], "tokens/s", None),
                "decode at 8,192": (steps, "tokens/s", steps),
                "memory, prefill of 8,192": ((answer["peak"] - worker.hello["before"]) / whole, "x weights + cache", None),
            }
        if measure == "prefill":
            return {title: (length / worker.ask(prompts=prompts, new=1, search=search)["seconds"], "tokens/s", None)}
        all = worker.ask(prompts=prompts, new=new + 1, search=search)
        # Not everybody says when a search with several hypotheses had its first tokens.
        one = all["first"] if search == "greedy" else worker.ask(prompts=prompts, new=1, search=search)["seconds"]
        if one >= all["seconds"]:
            return {}
        steps = new / (all["seconds"] - one)
        taken = {title: (lanes * steps, "tokens/s", steps if search == "greedy" else None)}
        if measure == "rows":
            whole = weights + rows * position * (length + new + 1)
            taken["memory, four rows"] = ((all["peak"] - worker.hello["before"]) / whole, "x weights + cache", None)
        return taken

    def by_itself(self, model: str, dtype: str, ours: Worker) -> dict:
        """Figures of ours that no peer has: {figure: values}."""
        prompts, new, figures = ids(1, 64, vocab(model)), self.options.new or MODELS[model], {}

        def note(figure: str, value: float) -> None:
            figures.setdefault(figure, []).append(value)

        for _ in range(self.options.turns):
            if "overhead" in self.options.measures:
                for search in ("greedy", "sample"):
                    answer = ours.ask(prompts=prompts, new=new + 1, search=search, timed=True)
                    note(f"outside, {search}", 1 - answer["forward"] / (answer["seconds"] - answer["first"]))
            if "products" in self.options.measures:
                answer = ours.ask(prompts=prompts, new=new + 1, search="greedy")
                steps = new / (answer["seconds"] - answer["first"])
                config = json.loads((self.peers.folder / "checkpoints" / f"{model}-{dtype}" / "config.json").read_text())
                products = self.probe.ask(products={"matrices": matrices(config), "half": dtype == "bf16"})["value"]
                note("rate", steps)
                note("products", 1 / products)
                note("of products", products * steps)
            if "callers" in self.options.measures:
                one = ours.ask(prompts=prompts, new=new, search="greedy")["seconds"]
                four = ours.ask(prompts=prompts, new=new, search="greedy", callers=4)["seconds"]
                note("four at once", 4 * one / four)
        return figures

    def bandwidth(self) -> float:
        self.readings.append(self.probe.ask(bandwidth=None)["value"])
        self.peaks.append(self.probe.ask(peak=None)["value"])
        return self.readings[-1]

    def upper(self) -> float:
        """What the memory gives when nobody disturbs it."""
        return statistics.quantiles(self.readings, n=10)[-1]


def follow() -> None:
    """Has the kernel kill this process when its parent dies: one that is stopped would stay for ever."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def ids(rows: int, length: int, vocab: int) -> list[list[int]]:
    """Ids that look like nothing in particular, the same for every engine."""
    return [[at * 2_654_435_761 % 2**32 % (vocab - 6) + 6 for at in range(row * length, (row + 1) * length)] for row in range(rows)]


def vocab(model: str) -> int:
    return {"smollm2-135m": 49152, "qwen2.5-0.5b": 151_936, "storyteller": 2048}[model]


def matrices(config: dict) -> list[tuple[int, int]]:
    """(outputs, inputs) of each matrix of a step, fused as one would."""
    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    width = config.get("head_dim", hidden // heads)
    layer = [((heads + 2 * kv) * width, hidden), (hidden, heads * width), (2 * mlp, hidden), (hidden, mlp)]
    return layer * config["num_hidden_layers"] + [(config["vocab_size"], hidden)]


# What of a processor's flags matters here.
FLAGS = ["avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8"]


def cpuinfo(key: str) -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.split(":")[0].strip() == key:
            return line.split(":", 1)[1].strip()
    return ""


def flags() -> set[str]:
    return set(cpuinfo("flags").split())


def processor() -> str:
    return f"{cpuinfo('model name')}, family {cpuinfo('cpu family')} model {cpuinfo('model')}"


def cores() -> int:
    """The physical cores that this process may use."""
    places = set()
    for cpu in os.sched_getaffinity(0):
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        places.add(tuple((topology / name).read_text() for name in ("physical_package_id", "core_id")) if topology.exists() else cpu)
    limit = Path("/sys/fs/cgroup/cpu.max")
    quota = limit.read_text().split() if limit.exists() else ["max"]
    return len(places) if quota[0] == "max" else max(1, min(len(places), int(quota[0]) // int(quota[1])))


def output(*command) -> str:
    """What a command prints; nothing where there is no such command."""
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip()
    except FileNotFoundError:
        return ""


def package(name: str) -> str:
    """The version of a package that ours is built with."""
    packages = tomllib.loads((ROOT / "Cargo.lock").read_text())["package"]
    return next((package["version"] for package in packages if package["name"] == name), "")


def build() -> Path:
    """Builds the Rust half as Cargo builds a release, and says where it is."""
    command = ["cargo", "build", "--release", "--bench", "peers", "--message-format", "json-render-diagnostics"]
    lines = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    artifacts = [line for line in map(json.loads, lines) if line.get("target", {}).get("name") == "peers" and line.get("executable")]
    return Path(artifacts[-1]["executable"])


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="candle-generate beside other engines")
    peers = ["transformers", "candle-transformers", "llama.cpp", "openvino", "ctranslate2"]
    measures = [*MEASURES, *ALONE]
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    parser.add_argument("--quick", action="store_true", help="two turns of 32 tokens, without the 0.5B shape and 8,192 positions")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=None)
    parser.add_argument("--files", nargs="+", choices=["f32", "bf16"], default=["f32", "bf16"], help="types of the weights in the file")
    parser.add_argument("--measures", nargs="+", choices=measures, default=None)
    parser.add_argument("--peers", nargs="*", choices=peers, default=peers)
    parser.add_argument("--threads", type=int, default=cores(), help="of every engine; the physical cores unless set")
    parser.add_argument("--turns", type=int, default=None, help="samples of each engine; 5 unless set")
    parser.add_argument("--new", type=int, default=None, help="tokens of a decode after the first")
    parser.add_argument("--folder", type=Path, default=target / "peers", help="environments, checkpoints, logs and results")
    parser.add_argument("--python", type=Path, default=None, help="an interpreter that has the peers; nothing is installed then")
    parser.add_argument("--driver", type=Path, default=None, help="the Rust half, where it is built already")
    chosen = parser.parse_args()
    chosen.turns = chosen.turns or (2 if chosen.quick else 5)
    chosen.new = chosen.new or (32 if chosen.quick else None)
    chosen.models = chosen.models or (["smollm2-135m", "storyteller"] if chosen.quick else list(MODELS))
    chosen.measures = chosen.measures or [name for name in measures if not (chosen.quick and name == "long")]
    return chosen


def main() -> None:
    chosen = options()
    Bench(chosen).run()
    print((chosen.folder / "table.md").read_text())
    print(f"also in {chosen.folder}: table.md, chart.svg, results.json", file=sys.stderr)


if __name__ == "__main__":
    main()
