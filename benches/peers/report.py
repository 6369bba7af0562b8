"""The results as a Markdown table and as a chart."""

import statistics
from html import escape

TITLES = {"smollm2-135m": "SmolLM2-135M's shape", "qwen2.5-0.5b": "Qwen2.5-0.5B's shape", "storyteller": "the storyteller (3M)"}
# What the chart shows.
SHOWN = ["prefill of 512", "decode", "four rows", "four beams"]
ALONE = {
    "outside, greedy": ("outside the forward pass, greedy", "{:.2%}"),
    "outside, sample": ("outside it, `top_k` 50, `top_p` 0.95, `repetition_penalty` 1.1", "{:.2%}"),
    "rate": ("decode, tokens/s", "{:,.1f}"),
    "products": ("its matrix products alone, steps/s", "{:,.1f}"),
    "of products": ("the first over the second", "{:.2f}"),
    "four at once": ("four calls at once, their tokens/s over one's", "{:.2f}"),
}


def markdown(results: dict) -> str:
    machine, versions = results["machine"], results["versions"]
    plural = "core" if machine["threads"] == 1 else "cores"
    long = any("decode at 8,192" in group["figures"] for group in results["groups"])
    few = ", two at 8,192 positions" if long and results["turns"] > 2 else ""
    lines = [
        f"## {machine['date']}, {machine['threads']} {plural} of {machine['processor']}",
        "",
        f"Flags: {', '.join(machine['flags'])}. {machine['threads']} threads for every engine; medians of {results['turns']} turns{few}. "
        f"Commit {machine['commit']}, {machine['rust']}, Linux {machine['kernel']}.",
        "",
        f"Read bandwidth, best way to read, before and after each sample: {spread(machine['bandwidth'])} GB/s. "
        f"Multiply-adds in f32 ({machine['instructions']}): {spread(machine['peak'])} Gflop/s. "
        f"Median, least and most of {len(machine['peak'])} readings.",
        "",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
    ]
    for group in results["groups"]:
        lines += ["", *table(group)]
    lines += ["", *alone(results["alone"]), "", *derived(results["groups"])]
    if results["differences"]:
        lines += ["", "Not the same tokens:", "", *[f"- {line}" for line in results["differences"]]]
    if results["missing"]:
        lines += ["", "Missing:", "", *[f"- {name}: {reason}" for name, reason in results["missing"].items()]]
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    least, middle, most = (value / 1e9 for value in (min(values), statistics.median(values), max(values)))
    return f"{middle:,.1f} ({least:,.1f} to {most:,.1f})"


def table(group: dict) -> list[str]:
    figures = group["figures"]
    engines = list(dict.fromkeys(engine for entry in figures.values() for engine in entry))
    header = [f"{TITLES[group['model']]}, {group['file']} file", *engines, "ours over the best", "ours, part of the bandwidth"]
    rows = [header, ["---"] * len(header)]
    for figure, entries in figures.items():
        cells = [cell(entries.get(engine)) for engine in engines]
        share = entries.get("ours", {}).get("shares")
        rows.append([f"{figure}{unit(entries)}", *cells, ratio(entries), f"{statistics.median(share):.0%}" if share else ""])
    return ["| " + " | ".join(row) + " |" for row in rows]


def unit(entries: dict) -> str:
    units = {entry["unit"] for entry in entries.values() if entry["values"]}
    return f", {units.pop()}" if units else ""


def cell(entry: dict | None) -> str:
    if entry is None:
        return ""
    if not entry["values"]:
        return "fails"
    value = statistics.median(entry["values"])
    number = f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
    # Half of its samples or more were taken while the memory was slow.
    return number + ("*" if 2 * entry.get("disturbed", 0) >= len(entry["values"]) else "")


def is_ours(engine: str) -> bool:
    return engine.startswith("ours")


def best(entries: dict) -> float | None:
    """The best peer's."""
    values = [statistics.median(entry["values"]) for engine, entry in entries.items() if not is_ours(engine) and entry["values"]]
    return max(values, default=None)


def ratio(entries: dict) -> str:
    theirs, ours = best(entries), entries.get("ours")
    if not theirs or not ours or not ours["values"] or ours["unit"] != "tokens/s":
        return ""
    text = f"{statistics.median(ours['values']) / theirs:.2f}"
    other = entries.get("ours, dtype bf16")
    return f"{text} ({statistics.median(other['values']) / theirs:.2f})" if other and other["values"] else text


def alone(groups: list[dict]) -> list[str]:
    groups = [group for group in groups if group["figures"]]
    if not groups:
        return []
    header = ["ours alone", *[f"{TITLES[group['model']]}, {group['file']} file" for group in groups]]
    rows = [header, ["---"] * len(header)]
    for figure, (title, form) in ALONE.items():
        values = [group["figures"].get(figure) for group in groups]
        if any(values):
            rows.append([title, *[form.format(statistics.median(list_)) if list_ else "" for list_ in values]])
    return ["| " + " | ".join(row) + " |" for row in rows]


def derived(groups: list[dict]) -> list[str]:
    """What two figures say together."""
    lines = []
    for group in groups:
        name, figures = f"{TITLES[group['model']]}, {group['file']} file", group["figures"]
        rows, beams = (ours(figures, figure) for figure in ("four rows", "four beams"))
        if rows and beams:
            lines.append(f"- {name}: a step of four beams takes {rows / beams:.2f} x one of four rows.")
        whole = next((g for g in groups if g["model"] == group["model"] and g["file"] == "f32"), None)
        if group["file"] == "bf16" and whole:
            mine, theirs = ours(figures, "prefill of 512"), best(whole["figures"].get("prefill of 512", {}))
            if mine and theirs:
                lines.append(f"- {name}: prefill in f32 arithmetic is {mine / theirs:.2f} x the best peer's with f32 weights.")
    return lines


def ours(figures: dict, figure: str) -> float | None:
    values = figures.get(figure, {}).get("ours", {}).get("values")
    return statistics.median(values) if values else None


STYLE = """
text { font: 12px system-ui, sans-serif; fill: #1f2328 }
.title { font-weight: 600; font-size: 14px }
.figure { font-weight: 600 }
.value { fill: #59636e }
.ours { fill: #c2410c }
.peer { fill: #8c959f }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc }
  .value { fill: #9198a1 }
  .ours { fill: #fb923c }
  .peer { fill: #656c76 }
}
"""
WIDTH, NAMES, BAR, LINE = 460, 160, 220, 17


def chart(results: dict) -> str:
    """Bars for each figure of each model and file, two panels side by side. No background, so that it suits any page."""
    groups = [group for group in results["groups"] if any(figure in group["figures"] for figure in SHOWN)]
    parts, top = [], 34
    for at in range(0, len(groups), 2):
        heights = []
        for side, group in enumerate(groups[at : at + 2]):
            drawn, height = panel(group, side * WIDTH, top)
            parts += drawn
            heights.append(height)
        top += max(heights) + 24
    machine = results["machine"]
    title = f"Tokens a second, {machine['threads']} threads of {machine['processor']}, {machine['date']}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH} {top}" width="{2 * WIDTH}" role="img">'
    return "\n".join(
        [head, f"<title>{escape(title)}</title>", f"<style>{STYLE}</style>", text(8, 18, title, "title"), *parts, "</svg>", ""]
    )


def panel(group: dict, left: int, top: int) -> tuple[list[str], int]:
    parts, y = [text(left + 8, top + 16, f"{TITLES[group['model']]}, {group['file']} file", "title")], top + 24
    for figure in SHOWN:
        entries = {engine: entry for engine, entry in group["figures"].get(figure, {}).items() if entry["values"]}
        if not entries:
            continue
        y += 20
        parts.append(text(left + 8, y, figure, "figure"))
        medians = {engine: statistics.median(entry["values"]) for engine, entry in entries.items()}
        for engine, value in sorted(medians.items(), key=lambda item: -item[1]):
            y += LINE
            kind, width = "ours" if is_ours(engine) else "peer", max(1, BAR * value / max(medians.values()))
            parts.append(text(left + NAMES, y, engine, end=True))
            parts.append(f'<rect class="{kind}" x="{left + NAMES + 6}" y="{y - 10}" width="{width:.1f}" height="12" rx="2"/>')
            parts.append(text(left + NAMES + 12 + width, y, cell(entries[engine]), "value"))
    return parts, y - top


def text(x: float, y: float, words: str, kind: str = "", end: bool = False) -> str:
    attributes = (f' class="{kind}"' if kind else "") + (' text-anchor="end"' if end else "")
    return f'<text x="{x:.1f}" y="{y}"{attributes}>{escape(words)}</text>'
