"""The report of what has been measured so far: Markdown and plots, made anew after each part."""

from collections.abc import Iterator, Mapping, Sequence

from matplotlib.figure import Figure

from benchmarks import common
from benchmarks.common import Cell, Row
from benchmarks.gpu.bench import Part
from benchmarks.gpu.results import Result, Results

_KINDS = {"attention": "#1f77b4", "products": "#2ca02c", "other": "#ff9896"}
REPORT = "gpu.md"


def write_report(results: Results, parts: Sequence[Part], left_out: Sequence[str], *, new: str = "") -> None:
    """Write what there is into the results' folder.

    `left_out` are parts for which there was no time; plots are made anew that show the part `new`.
    """
    made = {part.name: result for part in parts if (result := results.read(part.name)) is not None}
    for name, (prefix, draw) in _PLOTS.items():
        path = results.folder / f"{name}.png"
        if (new.startswith(prefix) or not path.exists()) and (figure := draw(results, made)):
            common.save_figure(path, figure)
    key = ", ".join(f"{name} {value}" for name, value in results.key.items() if name != "torch")
    where = f"{common.machine_line()}. Commit {common.commit()}, {key}. Weights are random."
    lines = common.bullets((*_headlines(results, made), *_missing(made, parts, left_out)))
    pictures = "\n\n".join(f"![{name}]({name}.png)" for name in _PLOTS if (results.folder / f"{name}.png").exists())
    groups: dict[str, list[Part]] = {}
    for part in parts:
        if part.name in made:
            groups.setdefault("video" if part.name.startswith("video-") else part.name, []).append(part)
    sections = [_section(results, name, group, made) for name, group in groups.items()]
    text = [f"# One GPU: {results.bench.preset}", where, lines, pictures, *sections]
    common.save_text(results.folder / REPORT, "\n\n".join(part for part in text if part))


def _section(results: Results, heading: str, parts: Sequence[Part], made: Mapping[str, Result]) -> str:
    peak, found = results.peak(), [made[part.name] for part in parts]
    rows: list[Row] = [row for result in found for row in result.rows]
    if peak and heading != "peaks":
        rows = [row | {"of the peak": f"{_rate(row) / peak:.0%}"} if "TFLOP/s" in row else row for row in rows]
    keys = {key: None for row in rows for key in row}
    text = common.table([{key: row.get(key, "") for key in keys} for row in rows])
    notes = [f"{part.name}: {made[part.name].error}" for part in parts if made[part.name].error]
    about = f"{parts[0].about} ({sum(result.seconds for result in found):.0f} s)"
    return "\n\n".join(part for part in (f"## {heading}", about, *notes, text) if part)


def _headlines(results: Results, made: Mapping[str, Result]) -> Iterator[str]:
    if goldens := results.rows("conformance"):
        known = [row for row in goldens if row["passed"] is not None]
        others = f", {len(goldens) - len(known)} are of kinds that are not known" if len(known) < len(goldens) else ""
        yield f"golden files: {sum(row['passed'] is True for row in known)} of {len(known)} pass{others}"
    if tests := results.rows("tests"):
        yield f"tests on the GPU: {tests[0]['tests']}"
    peak = results.peak()
    if peak:
        yield f"product in the model's dtype: {peak:.4g} TFLOP/s"
    best = max((row for row in results.rows("attention") if "TFLOP/s" in row), key=_rate, default=None)
    if best:
        yield f"attention at best: {_rate(best):.4g} TFLOP/s, {best['backend']}, {best['keys, chunks']} chunks of keys"
    for name, result in made.items():
        if name.startswith("pass-") and result.rows:
            row = result.rows[-1]
            share = f", {_rate(row) / peak:.0%} of the product's" if peak else ""
            what = f"{name.removeprefix('pass-')}, {row['keys, chunks']} chunks of keys"
            yield f"a pass with {what}: {_number(row['ms']):.4g} ms, {_rate(row):.4g} TFLOP/s{share}"
    for row in _video_rows(made):
        if row["seconds a chunk"] is not None:
            computed = "" if row["computed"] is None else f", {_number(row['computed']):.0%} of the steps computed"
            yield f"a video with {row['cache']}: {_number(row['seconds a chunk']):.3g} s a chunk{computed}"


def _missing(made: Mapping[str, Result], parts: Sequence[Part], left_out: Sequence[str]) -> Iterator[str]:
    cut = [name for name, result in made.items() if not result.complete]
    missing = [part.name for part in parts if part.name not in made and part.name not in left_out]
    for what, names in (("left out for want of time", left_out), ("not to their end", cut), ("missing", missing)):
        if names:
            without = " without --only" if names is missing else ""
            yield f"{what}: {', '.join(names)}; the same command{without} goes on with them"


# ---- plots


def _passes(results: Results, made: Mapping[str, Result]) -> Figure | None:
    found = {
        name.removeprefix("pass-"): one.rows for name, one in made.items() if name.startswith("pass-") and one.rows
    }
    if not found:
        return None
    title = f"A pass of one chunk, with TFLOP/s and share of the peak: {', '.join(found)}"
    figure, axes = common.new_plot(title, "keys, chunks", "ms")
    wide, peak = 0.8 / len(found), results.peak()
    for place, rows in enumerate(found.values()):
        at = [_number(row["keys, chunks"]) + (place - (len(found) - 1) / 2) * wide for row in rows]
        bottom = [0.0] * len(rows)
        for kind, colour in _KINDS.items():
            high = [_number(row[f"ms {kind}"]) for row in rows]
            axes.bar(at, high, 0.92 * wide, bottom, color=colour, label="" if place else kind)
            bottom = [low + more for low, more in zip(bottom, high)]
        for x, y, row in zip(at, bottom, rows):
            share = f"\n{_rate(row) / peak:.0%}" if peak else ""
            axes.text(x, y, f"{_rate(row):.3g}{share}", ha="center", va="bottom", fontsize=8)
    axes.margins(y=0.15)
    common.legend_below(figure, axes, len(_KINDS))
    return figure


def _videos(_: Results, made: Mapping[str, Result]) -> Figure | None:
    rows = [row for row in _video_rows(made) if row["seconds a chunk"] is not None]
    if not rows:
        return None
    figure, axes = common.new_plot("A chunk of a video, by preset of reuse", "", "seconds")
    names = [str(row["cache"]) for row in rows]
    axes.bar(names, [_number(row["seconds a chunk"]) for row in rows], 0.6, color=_KINDS["attention"])
    for place, row in enumerate(rows):
        text = "not to its end" if row["computed"] is None else f"{_number(row['computed']):.0%} computed"
        axes.text(place, _number(row["seconds a chunk"]), text, ha="center", va="bottom", fontsize=9)
    return figure


def _memory(_: Results, made: Mapping[str, Result]) -> Figure | None:
    rows = _video_rows(made)
    if not rows:
        return None
    figure, axes = common.new_plot("Memory of a video, by preset of reuse", "", "GB")
    for offset, name, colour in ((-0.2, "peak GB", _KINDS["attention"]), (0.2, "estimate GB", _KINDS["other"])):
        at = [place + offset for place in range(len(rows))]
        bars = axes.bar(at, [_number(row[name]) for row in rows], 0.38, color=colour, label=name.removesuffix(" GB"))
        axes.bar_label(bars, fmt="%.3g", fontsize=9)
    axes.set_xticks(range(len(rows)), [str(row["cache"]) for row in rows])
    common.legend_below(figure, axes, 2)
    return figure


def _video_rows(made: Mapping[str, Result]) -> list[Row]:
    return [row for name, result in made.items() if name.startswith("video-") for row in result.rows]


def _rate(row: Row) -> float:
    return _number(row["TFLOP/s"])


def _number(cell: Cell) -> float:
    return float(cell or 0)


_PLOTS = {"passes": ("pass-", _passes), "videos": ("video-", _videos), "memory": ("video-", _memory)}
"""By the names of their files: the parts that they show, and what draws them."""
