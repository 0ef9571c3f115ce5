"""What the study found, as tables and a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

BUDGETS = ("192", "128", "64", "32", "16")
_FLOORS = ("random", "uniform", "downsample")
_NOTED = (
    "vitcop", "vitcop-wide", "divprune", "cdpruner", "zspaprune", "scope", "visionzip", "visionzip+calibrated",
    "vscan+calibrated", "fastv", *_FLOORS,
)  # fmt: skip


def _share(values: Mapping[str, Any], kind: str = "all") -> str:
    return f"{100 * values['accuracy'][kind]['share']:.0f}"


def _methods(rows: Mapping[str, Any]) -> list[str]:
    found = dict.fromkeys(row.rsplit(" ", 1)[0] for row in rows if row.rsplit(" ", 1)[-1] in BUDGETS)
    return [name for name in found if not name.startswith(("saliency", "ablation"))]


def by_budget(found: Mapping[str, Any]) -> str:
    """Markdown: a row a method, a column a budget; of all questions, with half the widest interval of a column."""
    rows = found["rows"]
    lines = ["| method | " + " | ".join(BUDGETS) + " |", "|---|" + "---:|" * len(BUDGETS)]
    for name in _methods(rows):
        cells = [rows.get(f"{name} {budget}", {}) for budget in BUDGETS]
        lines.append(f"| {name} | " + " | ".join(_share(cell) if "accuracy" in cell else "-" for cell in cells) + " |")
    widths = []
    for budget in BUDGETS:
        spans = [own["accuracy"]["all"] for row, own in rows.items() if row.endswith(f" {budget}") and "accuracy" in own]
        widths.append(f"± {50 * max(span['high'] - span['low'] for span in spans):.0f}" if spans else "-")
    lines.append("| 95 % | " + " | ".join(widths) + " |")
    return "\n".join(lines)


def by_kind(found: Mapping[str, Any], budget: str) -> str:
    """Markdown: a row a method at one budget, a column a kind."""
    rows, times = found["rows"], found.get("times", {}).get(budget, {}).get("rows", {})
    kinds = [kind for kind in rows["dense"]["accuracy"] if kind != "all"]
    head = ["tokens", *kinds, "all", "95 %", "KV", "FLOPs", *(["TTFT", "selection"] if times else [])]
    lines = [f"| at {budget} | " + " | ".join(head) + " |", "|---|" + "---:|" * len(head)]
    for row in ("dense", *(f"{name} {budget}" for name in _methods(rows))):
        own = rows.get(row, {})
        if "accuracy" not in own:
            continue
        name, span = row.rsplit(" ", 1)[0] if row != "dense" else row, own["accuracy"]["all"]
        cells = [f"{own['mean_tokens']:.0f} of {own['of']}", *(_share(own, kind) for kind in kinds), _share(own)]
        cells += [f"{100 * span['low']:.0f} to {100 * span['high']:.0f}", f"{own['kv_bytes'] / 2**20:.2f} MiB"]
        cells += [f"1/{own['flop_ratio']:.1f}"]
        if times:
            own = times.get(name, {})
            cells.append(f"{own['ttft']:.1f} ms, {times['dense']['ttft'] / own['ttft']:.2f}x" if own else "-")
            cells.append(f"{own['selection']:.2f} ms" if "selection" in own else "-")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ablations(found: Mapping[str, Any]) -> str:
    """Markdown: ViTCoP with one thing changed; and how many answers turned right or wrong against the published setting."""
    rows = found["rows"]
    told = [row for row in rows if row.startswith("ablation") and "accuracy" in rows[row]]
    if not told:
        return ""
    kinds = [kind for kind in rows["dense"]["accuracy"] if kind != "all"]
    head = [*kinds, "all", "right now", "wrong now", "FLOPs"]
    lines = ["| ablation | " + " | ".join(head) + " |", "|---|" + "---:|" * len(head)]
    for row in told:
        own, base = rows[row], rows.get(f"{row.split(':')[0]}: published", {})
        turned = ["-", "-"]  # where the model cannot have the published setting at this budget
        if "right" in base:
            pairs = list(zip(*("".join(values["right"].values()) for values in (base, own)), strict=True))
            turned = [str(pairs.count(pair)) for pair in (("0", "1"), ("1", "0"))]
        cells = [*(_share(own, kind) for kind in kinds), _share(own), *turned, f"1/{own['flop_ratio']:.1f}"]
        lines.append(f"| {row.removeprefix('ablation ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tables(found: Mapping[str, Any]) -> str:
    """All of them, and what a model could not have."""
    rows = found["rows"]
    parts = [f"{found['model']}, {found['asked']} questions of each kind", by_budget(found)]
    parts += [by_kind(found, budget) for budget in BUDGETS if f"vitcop {budget}" in rows]
    parts.append(ablations(found))
    parts.append("\n".join(f"- left out: {row}: {own['left_out']}" for row, own in rows.items() if "left_out" in own))
    return "\n\n".join(part for part in parts if part)


def save_plot(found: Mapping[str, Any], path: Path) -> None:
    """Accuracy against tokens, a panel a kind of question; PNG."""
    pyplot = _pyplot()
    rows = found["rows"]
    kinds = list(rows["dense"]["accuracy"])
    figure, axes = pyplot.subplots(2, 4, figsize=(13, 6), sharex=True, sharey=True, layout="constrained")
    colours = pyplot.get_cmap("tab20")
    for panel, kind in zip(axes.flat, kinds):
        panel.axhline(100 * rows["dense"]["accuracy"][kind]["share"], color="black", lw=1, ls=":")
        for at, name in enumerate(_NOTED):
            points = [rows[f"{name} {budget}"] for budget in BUDGETS if "accuracy" in rows.get(f"{name} {budget}", {})]
            if points:
                x = [point["mean_tokens"] / point["of"] for point in points]
                y = [100 * point["accuracy"][kind]["share"] for point in points]
                style, width = "--" if name in _FLOORS else "-", 2.4 if name.startswith("vitcop") else 1.2
                panel.plot(x, y, style, marker=".", color=colours(at), label=name, lw=width)
        panel.set_title(kind)
        panel.set_xscale("log")
        panel.set_xticks([1 / 36, 1 / 18, 1 / 9, 2 / 9, 1 / 3], ["1/36", "1/18", "1/9", "2/9", "1/3"])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    for panel in axes[-1]:
        panel.set_xlabel("visual tokens, mean over layers")
    for panel in axes[:, 0]:
        panel.set_ylabel("right, %")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.suptitle(f"{found['model']}: answers of a small trained model, {found['asked']} held-out questions of each kind")
    _save(figure, path)


def save_time_plot(found: Mapping[str, Any], path: Path) -> None:
    """Accuracy against the time to the first token, a panel a budget whose times were measured; PNG."""
    rows, times = found["rows"], found.get("times", {})
    budgets = [budget for budget in BUDGETS if budget in times]
    if not budgets:
        raise SystemExit(f"no times of {found['model']} were measured: run the study with --time first")
    figure, axes = _pyplot().subplots(1, len(budgets), figsize=(6.5 * len(budgets), 5), sharey=True, squeeze=False)
    figure.set_layout_engine("constrained")
    for panel, budget in zip(axes.flat, budgets):
        for name, own in times[budget]["rows"].items():
            row = rows.get("dense" if name == "dense" else f"{name} {budget}", {})
            if "accuracy" in row:
                x, y = own["ttft"], 100 * row["accuracy"]["all"]["share"]
                colour = "black" if name == "dense" else "tab:red" if name.startswith("vitcop") else "tab:blue"
                panel.plot(x, y, "o", color=colour)
                panel.annotate(name, (x, y), (4, 3), textcoords="offset points", fontsize=7)
        panel.set_title(f"budget {budget}")
        panel.set_xlabel("time to the first token, ms")
        panel.grid(alpha=0.3)
    axes[0, 0].set_ylabel("right, % of all questions")
    figure.suptitle(f"{found['model']}: accuracy against time, {times[budgets[0]]['backend']}")
    _save(figure, path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    aside = path.with_name(f"{path.stem}.partial{path.suffix}")
    figure.savefig(aside, dpi=110)
    _pyplot().close(figure)
    aside.replace(path)
