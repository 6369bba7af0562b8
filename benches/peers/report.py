"""The results as a Markdown table and as a chart: report.py FOLDER RESULTS... writes both for the results of one or several runs."""

import json
import statistics
import sys
from html import escape
from pathlib import Path

TITLES = {"smollm2-135m": "SmolLM2-135M's shape", "qwen2.5-0.5b": "Qwen2.5-0.5B's shape", "storyteller": "the storyteller (3M)"}
# What is asked of ours, by the type of the file: the least ratio to the best peer, and the least part of the bandwidth.
RATIOS = {
    "prefill of 512": {"f32": 1.3},
    "decode": {"f32": 1.3, "bf16": 1.4},
    "four rows": {"f32": 1.5, "bf16": 2.0},
    "four beams": {"f32": 2.0},
    "contrastive, k = 4": {"f32": 2.5, "bf16": 4.0},
}
SHARES = {"f32": 0.92, "bf16": 0.88}
# Where that part of the bandwidth does instead of the ratio, for peers may leave no more room than that, and where it alone counts.
EITHER = [("decode", "f32"), ("decode", "bf16"), ("four rows", "f32")]
BANDWIDTH = [("decode", "qwen2.5-0.5b"), ("decode at 8,192", "smollm2-135m")]
# With `dtype` bf16.
HALF = {"prefill of 512": 1.1}
# Of bf16 files in f32 arithmetic, beside the best peer with the f32 file.
ACROSS = {"prefill of 512": 1.3}
# The most of weights and cache.
MEMORY = 1.15
# The most that a step of four beams may take of four rows'.
BEAMS = 1.1
# Of ours alone: title, form, what is asked, of which model, and whether a value is that.
ALONE = {
    "outside, greedy": ("outside the forward pass, greedy", "{:.2%}", "≤ 1%", "smollm2-135m", lambda value: value <= 0.01),
    "outside, sample": (
        "outside it, `top_k` 50, `top_p` 0.95, `repetition_penalty` 1.1",
        *("{:.2%}", "≤ 3%", "smollm2-135m", lambda value: value <= 0.03),
    ),
    "rate": ("decode, tokens/s", "{:,.1f}", "", "", None),
    "products": ("its matrix products alone, steps/s", "{:,.1f}", "", "", None),
    "of products": ("the first over the second", "{:.2f}", "≥ 0.60", "storyteller", lambda value: value >= 0.6),
    "four at once": ("four calls at once, their tokens/s over one's", "{:.2f}", "≥ 0.80", None, lambda value: value >= 0.8),
}
MARKS = {True: "✓", False: "✗"}


def write(results: dict, folder: Path) -> None:
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    (folder / "table.md").write_text(markdown(results))
    (folder / "chart.svg").write_text(chart(results))


def markdown(results: dict) -> str:
    machine, versions = results["machine"], dict(results["versions"])
    plural = "core" if machine["threads"] == 1 else "cores"
    long = any("decode at 8,192" in group["figures"] for group in results["groups"])
    few = ", two at 8,192 positions" if long and results["turns"] > 2 else ""
    made = [f"commit {machine['commit']}" if machine["commit"] else "", machine["rust"], f"Linux {machine['kernel']}"]
    if older := versions.pop("transformers 4", ""):
        versions["transformers for contrastive search"] = older
    tables = [line for group in results["groups"] for line in ["", *table(group, results["groups"])]] + ["", *alone(results["alone"])]
    met, unmet = (sum(line.count(mark) for line in tables) for mark in MARKS.values())
    lines = [
        f"## {machine['date']}, {machine['threads']} {plural} of {machine['processor']}",
        "",
        f"Flags: {', '.join(machine['flags'])}. {machine['threads']} threads for every engine; medians of {results['turns']} turns{few}. "
        f"Ours: {', '.join(part for part in made if part)}.",
        "",
        f"Read bandwidth, best way to read, before and after each sample: {spread(machine['bandwidth'])} GB/s. "
        f"Multiply-adds in f32 ({machine['instructions']}): {spread(machine['peak'])} Gflop/s. "
        f"Median, least and most of {len(machine['peak'])} readings.",
        "",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
        *(["", f"{met} of the {met + unmet} figures that something is asked of reach it (✓)."] if met + unmet else []),
        *tables,
    ]
    if results["differences"]:
        lines += ["", "Not the same tokens:", "", *[f"- {line}" for line in results["differences"]]]
    if results["missing"]:
        lines += ["", "Missing:", "", *[f"- {name}: {reason}" for name, reason in results["missing"].items()]]
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    least, middle, most = (value / 1e9 for value in (min(values), statistics.median(values), max(values)))
    return f"{middle:,.1f} ({least:,.1f} to {most:,.1f})"


def table(group: dict, groups: list[dict]) -> list[str]:
    """Ours first, with what it is beside the best peer and what is asked of that, then the peers."""
    figures = {figure: merged(entries) for figure, entries in group["figures"].items()}
    engines = list(dict.fromkeys(engine for entries in figures.values() for engine in entries))
    ours, theirs = [name for name in engines if is_ours(name)], [name for name in engines if not is_ours(name)]
    rows: list[list[str]] = []

    def add(title: str, mine: list[str], beside: list[str], peers: list[str]) -> None:
        rows.append([title, *padded(mine, len(ours)), *padded(beside, 3), *padded(peers, len(theirs))])

    add(f"{TITLES[group['model']]}, {group['file']} file", ours, ["over the best", "asked", "of the bandwidth"], theirs)
    rows.append(["---"] * len(rows[0]))
    whole = next((other["figures"] for other in groups if other["model"] == group["model"] and other["file"] == "f32"), {})
    for figure, entries in figures.items():
        mine, half, share = ratio(entries), ratio(entries, "ours, dtype bf16"), middle(entries.get("ours", {}).get("shares"))
        over = (f"{mine:.2f}" if mine else "") + (f" ({half:.2f})" if half else "")
        beside = [over, asked(group, figure, value(entries, "ours"), mine, half, share), f"{share:.0%}" if share else ""]
        most = best(entries)
        add(figure + unit(entries), [cell(entries.get(name)) for name in ours], beside, [cell(entries.get(name), most) for name in theirs])
        own, other = value(entries, "ours"), best(whole.get(figure, {}))
        if own and other and group["file"] == "bf16" and figure in ACROSS:
            # Two runs of turns, so by their medians.
            claim = mark(group, f"≥ {ACROSS[figure]:.2f}", round(own / other, 2) >= ACROSS[figure])
            add("the same over the best with the f32 file", [], [f"{own / other:.2f}", claim], [])
    beams, lines = (value(figures.get(figure, {}), "ours") for figure in ("four beams", "four rows"))
    if beams and lines:
        claim = mark(group, f"≤ {BEAMS:.2f}", round(lines / beams, 2) <= BEAMS)
        add("a step of four beams over one of four rows", [f"{lines / beams:.2f}"], ["", claim], [])
    return ["| " + " | ".join(row) + " |" for row in rows]


def padded(cells: list[str], count: int) -> list[str]:
    return cells + [""] * (count - len(cells))


def asked(group: dict, figure: str, mine: float | None, ratio: float | None, half: float | None, share: float | None) -> str:
    """What is asked of a figure, and whether it is reached as it is printed; any of several will do."""
    if figure.startswith("memory"):
        return mark(group, f"≤ {MEMORY}", None if mine is None else round(mine, 2) <= MEMORY)
    file, bandwidth = group["file"], (figure, group["model"]) in BANDWIDTH
    claims = []
    if figure in RATIOS and file in RATIOS[figure] and not bandwidth:
        claims.append((f"≥ {RATIOS[figure][file]:.2f}", ratio, RATIOS[figure][file]))
    if bandwidth or (figure, file) in EITHER:
        claims.append((f"{'≥ ' if bandwidth else ''}{SHARES[file]:.0%}", share, SHARES[file]))
    if half and figure in HALF:
        claims.append((f"(≥ {HALF[figure]:.2f})", half, HALF[figure]))
    reached = [None if value is None else round(value, 2) >= least for _, value, least in claims]
    # Missed only where nothing that would do is unknown.
    met = True if True in reached else None if None in reached else False
    return mark(group, " or ".join(words for words, _, _ in claims), met)


def mark(group: dict, words: str, met: bool | None) -> str:
    """Of the storyteller, which lies in the caches, only the last table asks."""
    return "" if group["model"] == "storyteller" or not words else f"{words} {MARKS.get(met, '')}".strip()


def merged(entries: dict) -> dict:
    """With the older transformers, which has a search that the newer has not, in the newer's column."""
    return {"transformers" if engine == "transformers 4" else engine: entry for engine, entry in entries.items()}


def unit(entries: dict) -> str:
    units = {entry["unit"] for entry in entries.values() if entry["values"]}
    return f", {units.pop()}" if units else ""


def middle(values: list[float] | None) -> float | None:
    return statistics.median(values) if values else None


def value(entries: dict, engine: str) -> float | None:
    return middle(entries.get(engine, {}).get("values"))


def cell(entry: dict | None, best: float | None = None) -> str:
    if entry is None:
        return ""
    if not entry["values"]:
        return "fails"
    middle = statistics.median(entry["values"])
    # Half of its samples or more were taken while the memory was slow.
    number = short(middle) + ("*" if 2 * entry.get("disturbed", 0) >= len(entry["values"]) else "")
    return f"**{number}**" if middle == best and entry["unit"] == "tokens/s" else number


def short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def is_ours(engine: str) -> bool:
    return engine.startswith("ours")


def best(entries: dict) -> float | None:
    """The best peer's."""
    values = [value(entries, engine) for engine in entries if not is_ours(engine)]
    return max((value for value in values if value), default=None)


def ratio(entries: dict, engine: str = "ours") -> float | None:
    """Over the peer that leaves the least: the median over the turns, in each of which the samples follow one another."""
    mine = entries.get(engine)
    if not mine or not mine["values"] or mine["unit"] != "tokens/s":
        return None

    def over(theirs: list[float]) -> float:
        if len(theirs) != len(mine["values"]):
            return statistics.median(mine["values"]) / statistics.median(theirs)
        return statistics.median(own / other for own, other in zip(mine["values"], theirs))

    return min((over(entry["values"]) for name, entry in entries.items() if not is_ours(name) and entry["values"]), default=None)


def alone(groups: list[dict]) -> list[str]:
    groups = [group for group in groups if group["figures"]]
    if not groups:
        return []
    header = ["ours alone", "asked", *[f"{TITLES[group['model']]}, {group['file']} file" for group in groups]]
    rows = [header, ["---"] * len(header)]
    for figure, (title, form, words, model, reached) in ALONE.items():
        row = []
        for group in groups:
            number = middle(group["figures"].get(figure))
            claimed = reached and model in (None, group["model"])
            row.append("" if number is None else form.format(number) + (f" {MARKS[reached(number)]}" if claimed else ""))
        if any(row):
            rows.append([title, words, *row])
    return ["| " + " | ".join(row) + " |" for row in rows]


# One palette and no background, for light and dark pages, as a picture does not know which it is on.
STYLE = """
text { font: 12px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #768390 }
.title { font-weight: 600; font-size: 13px }
.figure { font-weight: 600 }
.mine { font-weight: 600; fill: #e0590f }
.ours { fill: #e0590f }
.peer { fill: #8c959f; opacity: 0.7 }
"""
# What the chart shows: a panel each, side by side.
SHOWN = ["prefill of 512", "decode", "four rows", "four beams"]
NAMES, PANEL, BAR, LINE, EDGE = 168, 178, 112, 18, 8


def chart(results: dict) -> str:
    """For each model and file the engines, one below the other, and their bars for each figure."""
    groups = [group for group in results["groups"] if any(figure in group["figures"] for figure in SHOWN)]
    shown = [figure for figure in SHOWN if any(figure in group["figures"] for group in groups)]
    machine = results["machine"]
    title = f"Tokens a second: {machine['threads']} threads of {machine['processor']}, {machine['date']}"
    width, top, parts = NAMES + PANEL * len(shown), 46, []
    for at, figure in enumerate(shown):
        parts.append(text(NAMES + at * PANEL, top, figure, "figure"))
    for group in groups:
        figures = {figure: merged(group["figures"].get(figure, {})) for figure in shown}
        engines = list(dict.fromkeys(engine for entries in figures.values() for engine in entries))
        top += 30
        parts.append(text(EDGE, top, f"{TITLES[group['model']]}, {group['file']} file", "title"))
        for engine in engines:
            top += LINE
            kind = "mine" if is_ours(engine) else ""
            parts.append(text(NAMES - EDGE, top, engine, kind, end=True))
            for at, entries in enumerate(figures.values()):
                most = max((value(entries, name) or 0 for name in engines), default=0)
                if number := value(entries, engine):
                    parts += bar(NAMES + at * PANEL, top, number / most, short(number), kind)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top + 12}" width="{width}" role="img">'
    lines = [head, f"<title>{escape(title)}</title>", f"<style>{STYLE}</style>", text(EDGE, 18, title, "title"), *parts, "</svg>", ""]
    return "\n".join(lines)


def bar(x: int, y: int, part: float, words: str, kind: str) -> list[str]:
    width = max(1, BAR * part)
    shape = f'<rect class="{"ours" if kind else "peer"}" x="{x}" y="{y - 10}" width="{width:.1f}" height="12" rx="2"/>'
    return [shape, text(x + width + 6, y, words, kind)]


def text(x: float, y: float, words: str, kind: str = "", end: bool = False) -> str:
    attributes = (f' class="{kind}"' if kind else "") + (' text-anchor="end"' if end else "")
    return f'<text x="{x:.1f}" y="{y}"{attributes}>{escape(words)}</text>'


def joined(runs: list[dict]) -> dict:
    """The results of several runs on one machine as those of one."""
    first, *others = runs
    for run in others:
        for key in ("groups", "alone", "differences"):
            first[key] += run[key]
        for key in ("bandwidth", "peak"):
            first["machine"][key] += run["machine"][key]
        for key in ("versions", "missing"):
            first[key] |= run[key]
    return first


if __name__ == "__main__":
    write(joined([json.loads(Path(name).read_text()) for name in sys.argv[2:]]), Path(sys.argv[1]))
