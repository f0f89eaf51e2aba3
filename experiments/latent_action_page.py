"""The page of a report on latent actions: one HTML file, its pictures inside, for light and dark, wide and narrow."""

import base64
import dataclasses
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import imageio.v3 as imageio
import numpy as np
from jaxtyping import Float

Image = Float[np.ndarray, "H W C"]

FULL_HEAT = 0.5  # difference of a pixel, averaged over its channels, that the heat map shows as white
GAP = 2  # pixels between pictures of a strip
CHART = (640, 180)  # units of a chart
PALETTE = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#9c755f", "#edc948", "#76b7b2")
OTHER = "#8a8a8a"
NAMED = 6  # codes of a transition that its name spells out
MEASURES = {"nmi": "NMI", "purity": "purity"}
MOST_POSITIONS = 8  # of a transition's codes, that are listed one by one

STYLE = """
:root { color-scheme: light dark; --ink: #1d2024; --paper: #fdfdfc; --soft: #6b7078; --line: #d9dbdf; --mark: #2f6fb3; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e7e9; --paper: #16181b; --soft: #9aa0a8; --line: #34383e; --mark: #6fb0f0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.2; } h2 { font-size: 1.15rem; margin-top: 2.5rem; } h3 { font-size: 1rem; }
p, figcaption, .soft { max-width: 42rem; } .soft, figcaption { color: var(--soft); font-size: .875rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .25rem .7rem .25rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child, .words { text-align: left; } td:first-child, td.words { white-space: normal; }
td.words { min-width: 12rem; }
th { font-weight: 600; } figure { margin: 1rem 0; } figure.code { margin: 0; }
img { display: block; max-width: 100%; image-rendering: pixelated; }
.strip img { width: 100%; max-width: 44rem; } .heads { display: grid; grid-template-columns: repeat(4, 1fr);
  max-width: 44rem; margin-top: 1.5rem; text-align: center; } .grid { display: grid; gap: .6rem;
  grid-template-columns: repeat(auto-fill, minmax(5.5rem, 1fr)); } .grid img { width: 100%; }
.grid figcaption { font-size: .75rem; line-height: 1.3; overflow-wrap: anywhere; }
svg { width: 100%; height: auto; max-width: 44rem; display: block; } svg text { fill: var(--soft); font-size: 11px; }
.axis { stroke: var(--line); } .bar { fill: var(--mark); } .curve { stroke: var(--mark); fill: none; stroke-width: 2; }
.key { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin: 0 .3em 0 .8em; }
@media (max-width: 32rem) { svg text { font-size: 18px; } }
"""


@dataclasses.dataclass(frozen=True)
class Pair:
    """A current frame, the next one, the predicted one, in [0, 1], and the ids of the codes."""

    current: Image
    truth: Image
    predicted: Image
    code: list[int]


@dataclasses.dataclass(frozen=True)
class Grid:
    """A frame, what it becomes under each of some codes, and how large a share of transitions each has."""

    frame: Image
    made: Float[np.ndarray, "N H W C"]
    codes: list[list[int]]
    shares: list[float]


def make_page(figures: Mapping[str, Any], pairs: Sequence[Pair], grids: Sequence[Grid]) -> str:
    """``figures`` is the content of ``report.json``; the pictures are of its split ``held_out``."""
    splits, held_out = figures["splits"], figures["held_out"]
    sections = [
        introduction(figures),
        section("Predictions", prediction_table(splits), pair_strips(pairs, held_out)),
        section("Codes", code_table(splits), usage_chart(figures), embedding_chart(figures)),
        section("The same frame under each code", *(code_grid(grid) for grid in grids)),
        section("Codes and true actions", *action_parts(figures)),
        section("From actions to codes", *control_parts(figures["control"])),
        section("Codes and events", *event_parts(splits, held_out)),
        section("By game element", *element_parts(splits)),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Latent actions of {escape(figures['run'])}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def introduction(figures: Mapping[str, Any]) -> str:
    codes = "1 code" if figures["tokens"] == 1 else f"{figures['tokens']} codes"
    notes = "".join(paragraph(f"{note[0].upper()}{note[1:]}.") for note in figures["notes"])
    return (
        f"<h1>Latent actions of {escape(figures['run'])}</h1>\n"
        + paragraph(
            f"Step {figures['step']}, {codes} of {figures['code_count']} for each transition, measured on clips of"
            f" {figures['frames']} frames of {figures['data']}. Pictures are of the split {figures['held_out']}."
        )
        + notes
    )


# ----- sections -----


def prediction_table(splits: Mapping[str, Any]) -> str:
    lines = {
        "pairs": ("pairs", "d"),
        "PSNR, dB": ("psnr", ".2f"),
        "SSIM": ("ssim", ".4f"),
        "L1": ("l1", ".5f"),
        "L2": ("l2", ".6f"),
        "PSNR of the current frame, dB": ("copy_psnr", ".2f"),
        "PSNR from another pair's codes, dB": ("shuffled_psnr", ".2f"),
        "above the current frame, dB": ("over_copy", "+.2f"),
        "above another pair's codes, dB": ("over_shuffled", "+.2f"),
        "share of the change explained": ("explained", ".1%"),
    }
    rows = [[name, *(form(x[key], how) for x in splits.values())] for name, (key, how) in lines.items()]
    return table(["", *splits], rows, "The predicted next frame, against the true one. L2 is the mean squared error.")


def pair_strips(pairs: Sequence[Pair], held_out: str) -> str:
    heads = "".join(f"<span>{name}</span>" for name in ("frame", "prediction", "next frame", "difference"))
    strips = []
    for pair in pairs:
        heat = heat_map(np.abs(pair.predicted - pair.truth).mean(-1))
        picture = strip([pair.current, pair.predicted, pair.truth, heat])
        strips.append(f'<figure class="strip">{picture_tag(picture, f"code {code_name(pair.code)}")}</figure>')
    note = f"From {held_out} clips, the transition in which most changes. White: a difference of {FULL_HEAT} or more."
    return f'<div class="heads soft">{heads}</div>\n' + "\n".join(strips) + paragraph(note, "soft")


def code_table(splits: Mapping[str, Any]) -> str:
    codes = {split: x["codes"] for split, x in splits.items()}
    rows = [
        ["share of codes in use", *(form(x["used"], ".1%") for x in codes.values())],
        ["perplexity", *(form(x["perplexity"], ".1f") for x in codes.values())],
    ]
    positions = len(next(iter(codes.values()))["positions"])
    if positions > 1:
        rows.append(["different transitions, all codes together", *(str(x["joint_values"]) for x in codes.values())])
        for i in range(min(positions, MOST_POSITIONS)):
            rows.append(
                [f"perplexity at position {i}", *(form(x["positions"][i]["perplexity"], ".1f") for x in codes.values())]
            )
    return table(["", *splits], rows, "Use of the codebook, over all positions unless one is named.")


def usage_chart(figures: Mapping[str, Any]) -> str:
    """Bars, the most used code first, over all splits together."""
    shares = sorted(figures["embedding"]["usage"], reverse=True)
    width, height = CHART
    step, top = (width - 40) / len(shares), max(shares)
    bars = "".join(
        f'<rect class="bar" x="{40 + i * step:.2f}" y="{10 + (height - 30) * (1 - share / top):.2f}"'
        f' width="{max(0.5, 0.85 * step):.2f}" height="{(height - 30) * share / top:.2f}"/>'
        for i, share in enumerate(shares)
        if share > 0
    )
    marks = f'<text x="0" y="18">{top:.1%}</text><text x="40" y="{height - 4}">most used</text>'
    marks += f'<text x="{width}" y="{height - 4}" text-anchor="end">{len(shares)} codes</text>'
    line = f'<line class="axis" x1="40" x2="{width}" y1="{height - 20}" y2="{height - 20}"/>'
    caption = "Share of each code, the most used first, over all splits."
    return chart(line + bars + marks, width, height, caption)


def embedding_chart(figures: Mapping[str, Any]) -> str:
    """A dot for each code, as large as it is used; coloured by the action that was seen with it most often."""
    embedding, width, height = figures["embedding"], 640, 400
    points, usage = np.array(embedding["points"]), np.array(embedding["usage"])
    spread = np.maximum(np.ptp(points, axis=0), 1e-9)
    places = 20 + (points - points.min(0)) / spread * (np.array([width, height]) - 40)
    colors, key = action_colors(figures)
    dots = []
    for i in np.argsort(-usage, kind="stable"):
        radius = 2 + 14 * math.sqrt(usage[i] / usage.max())
        look = (
            f'fill="{colors.get(int(i), OTHER)}" fill-opacity="0.75"' if usage[i] else f'fill="none" stroke="{OTHER}"'
        )
        name = f"<title>code {i}: {usage[i]:.2%}</title>"
        dots.append(f'<circle cx="{places[i][0]:.1f}" cy="{places[i][1]:.1f}" r="{radius:.1f}" {look}>{name}</circle>')
    caption = f"The vectors of the codes on a plane ({embedding['method']}): large where much used, hollow where never."
    return chart("".join(dots), width, height, caption) + key


def action_colors(figures: Mapping[str, Any]) -> tuple[dict[int, str], str]:
    """The colour of each code, where a transition has one, and what the colours mean."""
    actions = figures["splits"][figures["held_out"]]["actions"]
    if figures["tokens"] > 1 or not actions or not actions["codes"]:
        return {}, ""
    weight: dict[int, tuple[float, str]] = {}
    palette = dict(zip(actions["codes"], PALETTE, strict=False))
    for name, codes in actions["codes"].items():
        for found in codes:
            count, code = found["share"] * actions["labels"][name], found["code"][0]
            weight[code] = max(weight.get(code, (0.0, OTHER)), (count, palette.get(name, OTHER)))
    keys = "".join(f'<span class="key" style="background:{c}"></span>{escape(name)}' for name, c in palette.items())
    said = f'<p class="soft">Action seen with it most often, of its {len(palette)} most frequent codes:{keys}</p>'
    return {code: color for code, (_, color) in weight.items()}, said


def code_grid(grid: Grid) -> str:
    cells = [(grid.frame, np.zeros(grid.frame.shape[:2]), "the frame")]
    for i, (made, code, share) in enumerate(zip(grid.made, grid.codes, grid.shares, strict=True), 1):
        name = code_name(code) if len(code) <= NAMED else f"{i}."  # of many codes the first ones may all be the same
        cells.append((made, np.abs(made - grid.frame).mean(-1), f"{name} · {share:.1%}"))
    figures = "".join(
        f'<figure class="code">{picture_tag(stack([image, heat_map(heat)]), name)}'
        f"<figcaption>{escape(name)}</figcaption></figure>"
        for image, heat, name in cells
    )
    return f'<div class="grid">{figures}</div>' + paragraph(
        "The most used codes and their share of transitions; below each picture what changes against the frame.", "soft"
    )


def action_parts(figures: Mapping[str, Any]) -> Iterable[str]:
    told = {split: x["actions"] for split, x in figures["splits"].items() if x["actions"]}
    if not told:
        control = figures["control"]
        yield paragraph(
            "The data have no true actions that are known, so this is not to be said."
            if control is None
            else "The true actions are continuous: how well codes tell them is in the next section."
        )
        return
    yield telling_table(told)
    yield told_paragraph(figures["tokens"])
    yield frequent_table(told.get(figures["held_out"]), "true action")


def event_parts(splits: Mapping[str, Any], held_out: str) -> Iterable[str]:
    names = list(dict.fromkeys(name for x in splits.values() for name in x["events"]))
    if not names:
        yield paragraph("The data have no true state that tells events, so this is not to be said.")
    for name in names:
        told = {split: x["events"][name] for split, x in splits.items() if name in x["events"]}
        yield f"<h3>{escape(name.capitalize())}</h3>" + telling_table(told) + frequent_table(told.get(held_out), name)


def telling_table(told: Mapping[str, Any]) -> str:
    rows = [["transitions", *(str(x["pairs"]) for x in told.values())]]
    for key, name in MEASURES.items():
        rows.append([f"{name}, all codes together", *(form(x[key], ".3f") for x in told.values())])
        rows.append([f"{name} by chance, all together", *(chance(x["chance"], key) for x in told.values())])
    rows.append(["most frequent", *(form(x["largest"], ".3f") for x in told.values())])
    if any(x["positions"] for x in told.values()):
        best = [(x["positions"][x["best_position"]] if x["positions"] else {}) for x in told.values()]
        place = ["–" if x["best_position"] is None else str(x["best_position"]) for x in told.values()]
        rows.append(["position that tells most", *place])
        for key, name in MEASURES.items():
            rows.append([f"{name} there", *(form(x.get(key), ".3f") for x in best)])
            rows.append([f"{name} of the best by chance", *(chance(x["best_chance"], key) for x in told.values())])
    return table(["", *told], [row for row in rows if any(cell != "–" for cell in row[1:])])


def chance(found: Mapping[str, Mapping[str, float]] | None, measure: str) -> str:
    """The mean of a measure over random orders, and its 95 % quantile."""
    return "–" if found is None else f"{found[measure]['mean']:.3f} (95 %: {found[measure]['high']:.3f})"


def told_paragraph(tokens: int) -> str:
    joint = (
        " All codes of a transition count as one value where each such value comes ten times on average; the codes at a"
        " position are always counted."
        if tokens > 1
        else ""
    )
    return paragraph(
        "NMI is 1 where codes and labels tell the same, 0 where they have nothing to do with each other (arithmetic"
        " mean). Purity is the share of transitions whose label is the most frequent one of their code, and most"
        " frequent what it would be with one code. By chance is what both are with the labels in a random order: the"
        " mean over 200 orders and, in brackets, what 95 % of them do not exceed. A figure that is not above says"
        " nothing of the codes." + joint,
        "soft",
    )


def frequent_table(told: Mapping[str, Any] | None, what: str) -> str:
    if not told or not told["codes"]:
        return ""
    rows = [
        [name, str(told["labels"][name]), ", ".join(f"{code_name(x['code'])} ({x['share']:.0%})" for x in codes)]
        for name, codes in told["codes"].items()
    ]
    return table([what, "transitions", "its most frequent codes"], rows, words=True)


def control_parts(control: Mapping[str, Any] | None) -> Iterable[str]:
    if control is None:
        yield paragraph("The data have no true actions that are known, so there is nothing to calibrate with.")
        return
    yield curve_chart(control)
    said = f"With all {control['clips']} labelled clips: {form(control['all'], '.3f')} ({control['measure']})."
    if control["most_frequent_action"] is not None:
        said += f" The most frequent action alone: {form(control['most_frequent_action'], '.3f')}."
    if control["unseen"]:
        said += f" Never seen, and so given the most frequent code of all: {', '.join(control['unseen'])}."
    yield paragraph(said)
    if control["table"]:
        rows = [[x["action"], str(x["seen"]), code_name(x["code"])] for x in control["table"]]
        yield table(
            ["action", "seen", "code"], rows, "The code that stands for each action (calibration.json).", words=True
        )


def curve_chart(control: Mapping[str, Any]) -> str:
    """The mean of each number of clips, and every single value as a dot."""
    (width, height), curve = CHART, control["curve"]
    if not curve:
        return ""
    low = min(0.0, *(x for point in curve.values() for x in point["scores"]))

    def place(i: int, value: float) -> str:
        return (
            f"{60 + i * (width - 90) / max(1, len(curve) - 1):.1f},{10 + (height - 40) * (1 - value) / (1 - low):.1f}"
        )

    parts = []
    for value in (low, 1.0):
        y = place(0, value).split(",")[1]
        parts.append(
            f'<line class="axis" x1="40" x2="{width}" y1="{y}" y2="{y}"/><text x="0" y="{y}">{value:.2f}</text>'
        )
    parts.append(
        f'<polyline class="curve" points="{" ".join(place(i, p["mean"]) for i, p in enumerate(curve.values()))}"/>'
    )
    for i, (k, point) in enumerate(curve.items()):
        x, y = place(i, point["mean"]).split(",")
        parts.append(f'<text x="{x}" y="{height - 6}" text-anchor="middle">{k}</text>')
        beside = float(y) + (16 if float(y) < 26 else -8)
        parts.append(f'<text x="{x}" y="{beside:.1f}" text-anchor="middle">{point["mean"]:.2f}</text>')
        for score in point["scores"]:
            x, y = place(i, score).split(",")
            parts.append(f'<circle class="bar" cx="{x}" cy="{y}" r="2.5"/>')
    caption = f"Actions read from codes on held-out clips ({control['measure']}), against the number of labelled clips."
    return chart("".join(parts), width, height, caption)


def element_parts(splits: Mapping[str, Any]) -> Iterable[str]:
    names = list(dict.fromkeys(name for x in splits.values() for name in x["elements"]))
    if not names:
        yield paragraph("The data have no true state that tells where things are, so this is not to be said.")
        return
    lines = {
        "pairs": ("pairs", "d"),
        "PSNR, dB": ("psnr", ".2f"),
        "the current frame's, dB": ("copy_psnr", ".2f"),
        "from another pair's codes, dB": ("shuffled_psnr", ".2f"),
        "lost with them, dB": ("drop", "+.2f"),
    }
    for name in names:
        found = {split: x["elements"][name] for split, x in splits.items() if name in x["elements"]}
        rows = [[line, *(form(x[key], how) for x in found.values())] for line, (key, how) in lines.items()]
        yield f"<h3>Round the {escape(name)}</h3>" + table(["", *found], rows)
    bricks = {split: x["bricks"] for split, x in splits.items() if x["bricks"]}
    if bricks:
        lines = {
            "kept right": ("own", ".3%"),
            "of the current frame": ("copy", ".3%"),
            "from another pair's codes": ("other", ".3%"),
            "broken in the transition": ("broken", "d"),
            "of these, right": ("own_broken", ".1%"),
            "of these, from another pair's codes": ("other_broken", ".1%"),
        }
        rows = [[line, *(form(x[key], how) for x in bricks.values())] for line, (key, how) in lines.items()]
        yield "<h3>Bricks</h3>" + table(["", *bricks], rows, "Share of bricks whose place shows what the state says.")


# ----- parts -----


def escape(text: object) -> str:
    """Text from outside, of which nothing is markup."""
    return html.escape(str(text))


def form(x: float | None, how: str) -> str:
    return "–" if x is None else f"{x:{how}}"


def code_name(code: Sequence[int]) -> str:
    """The ids of a transition's codes; of many the first ones."""
    return "-".join(map(str, code[:NAMED])) + ("…" if len(code) > NAMED else "")


def section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", *, words: bool = False) -> str:
    """With ``words`` the last column is text."""

    def cell(i: int, text: str, tag: str = "td") -> str:
        kind = ' class="words"' if words and i == len(head) - 1 else ""
        return f"<{tag}{kind}>{escape(text)}</{tag}>"

    said = paragraph(caption, "soft") if caption else ""
    heads = "".join(cell(i, name, "th") for i, name in enumerate(head))
    body = "".join(f"<tr>{''.join(cell(i, x) for i, x in enumerate(row))}</tr>" for row in rows)
    return f'{said}<div class="wide"><table><tr>{heads}</tr>{body}</table></div>'


def chart(content: str, width: int, height: int, caption: str) -> str:
    drawn = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(caption)}">{content}</svg>'
    return f"<figure>{drawn}<figcaption>{escape(caption)}</figcaption></figure>"


def picture_tag(image: Image, name: str) -> str:
    """The picture inside the page, pixel by pixel: browsers enlarge it without smoothing."""
    pixels = (np.clip(np.nan_to_num(image), 0, 1) * 255 + 0.5).astype(np.uint8)
    data = imageio.imwrite("<bytes>", pixels, extension=".png") or b""
    return f'<img alt="{escape(name)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def in_color(image: Image) -> Image:
    return np.broadcast_to(image, (*image.shape[:2], 3))


def strip(images: Sequence[Image]) -> Image:
    """Side by side, grey between them."""
    height = images[0].shape[0]
    gap = np.full((height, GAP, 3), 0.5)
    parts = [part for image in images for part in (in_color(image), gap)]
    return np.concatenate(parts[:-1], axis=1)


def stack(images: Sequence[Image]) -> Image:
    """Below each other, grey between them."""
    gap = np.full((GAP, images[0].shape[1], 3), 0.5)
    parts = [part for image in images for part in (in_color(image), gap)]
    return np.concatenate(parts[:-1], axis=0)


def heat_map(difference: Float[np.ndarray, "H W"]) -> Image:
    """Black, red, yellow, white: none to ``FULL_HEAT`` and more."""
    heat = np.clip(np.nan_to_num(difference, nan=FULL_HEAT) / FULL_HEAT, 0, 1)
    return np.clip(3 * heat[..., None] - np.arange(3), 0, 1)
