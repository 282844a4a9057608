"""The report of an evaluation: one HTML file that opens without a network, and needs no script.

Labels, texts and tokens come from files that nobody vouches for: everything is escaped, and a content
security policy forbids the page to load or run anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path

from nybble.evaluate import numerals as write
from nybble.evaluate import plots
from nybble.evaluate.results import Evaluation, Flip, ModelResult

_STYLE = """
:root{color-scheme:light dark;--ink:#1c2128;--soft:#5b6470;--line:#d5dae0;--page:#fff;--band:#f4f6f8;
--c0:#5b6470;--c1:#0072b2;--c2:#d55e00;--c3:#009e73;--c4:#cc79a7;--c5:#b8860b;--c6:#56a0d8;--c7:#7a5195}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ed;--soft:#9aa4b0;--line:#363d46;--page:#14171b;
--band:#1c2026;--c0:#9aa4b0;--c1:#4ea8de;--c2:#ff8c42;--c3:#2ecc97;--c4:#e79ac4;--c5:#e0b040;--c6:#8cc8f0;
--c7:#b08cd9}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1100px;padding:2rem 1.25rem 4rem;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.7rem;margin:0 0 .3rem}h2{font-size:1.15rem;margin:2.4rem 0 .6rem}
h3{font-size:.95rem;margin:0 0 .2rem;font-weight:600}
p{margin:.4rem 0}.soft{color:var(--soft)}.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .6rem;text-align:right;border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:600;color:var(--soft);font-size:.85rem}td:first-child,th:first-child,th.text,td.text{text-align:left}
td{white-space:nowrap}td.text,td:first-child{white-space:normal;overflow-wrap:anywhere}td:first-child{min-width:10em}
small{display:block;color:var(--soft)}
tbody tr:nth-child(even){background:var(--band)}
code,.token{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.86em}
.token{background:var(--band);border:1px solid var(--line);border-radius:3px;padding:0 .25em}
.token{display:inline-block;max-width:20em;white-space:pre-wrap;overflow-wrap:anywhere}
.swatch{display:inline-block;width:.7em;height:.7em;border-radius:50%;margin-right:.45em;background:currentColor}
.failed{color:#c62828}.grid2,.grid3{display:grid;gap:1.2rem}
.grid2{grid-template-columns:repeat(auto-fit,minmax(380px,1fr))}
.grid3{grid-template-columns:repeat(auto-fit,minmax(260px,1fr))}
figure{margin:0}figcaption{color:var(--soft);font-size:.85rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1.2rem;margin:0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
details{margin:.6rem 0}summary{cursor:pointer;font-weight:600}
.plot{width:100%;height:auto;font-size:11px}
.plot text{fill:var(--ink)}.plot .tick,.plot .title{fill:var(--soft)}
.plot .grid{stroke:var(--line);stroke-width:1}.plot .mark{stroke:var(--soft);stroke-dasharray:4 3}
.plot text.mark{stroke:none;fill:var(--soft)}
.plot polyline{fill:none;stroke:currentColor;stroke-width:1.5}.plot circle{fill:currentColor}
.plot text.label{paint-order:stroke;stroke:var(--page);stroke-width:3px}
""" + "".join(f".c{i}{{color:var(--c{i})}}" for i in range(plots.COLOURS))

TEXT = ' class="text"'
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def write_report(evaluation: Evaluation, path: str | os.PathLike[str]) -> None:
    """Write the report; an older one of that name is replaced once this one is complete.

    Raises:
        OutputError: it cannot be written.
    """
    from nybble.formats.output import staged_file

    with staged_file(Path(path), overwrite=True) as partial:
        partial.write_text(report(evaluation), encoding="utf-8")


def report(evaluation: Evaluation) -> str:
    """The report's HTML."""
    title = f"Evaluation: {evaluation.reference.label}" + (
        f" and {len(evaluation.others)} more" if evaluation.others else ""
    )
    body = "".join(
        [
            f"<h1>{_text(title)}</h1>",
            _lead(evaluation),
            _overview(evaluation),
            _trade_offs(evaluation),
            _layers(evaluation),
            _flips(evaluation),
            _method(evaluation),
        ]
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_text(_POLICY)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head>\n<body>{body}</body></html>\n"
    )


def _lead(evaluation: Evaluation) -> str:
    scored = f"{evaluation.scored:,} tokens of {evaluation.windows:,} windows"
    text = f'<p class="soft">{scored} of <code>{_text(evaluation.text)}</code>, the same for every model.'
    if evaluation.others:
        text += f" The reference is <b>{_text(evaluation.reference.label)}</b>."
    return text + "</p>"


# -- the table ---------------------------------------------------------------------------------------


def _overview(evaluation: Evaluation) -> str:
    header = (
        "Model", "Perplexity", "KL divergence, mean", "99th percentile", "Same top token", "Size",
        "Bits a weight", "Prefill, tokens/s", "Decode, tokens/s", "Peak memory",
    )  # fmt: skip
    rows = [_overview_row(index, model) for index, model in enumerate(evaluation.models)]
    failures = [
        f'<p class="failed">{_text(model.label)} failed: {_text(model.failure)}</p>'
        for model in evaluation.models
        if model.failure is not None
    ]
    notes = [
        f'<p class="soft">{_text(model.label)}: {_text(note)}</p>'
        for model in evaluation.models
        for note in model.notes
    ]
    return _table(header, rows) + "".join(failures + notes)


def _overview_row(index: int, model: ModelResult) -> list[str]:
    quality = model.quality
    bits = model.bits_per_weight
    name = f'<span class="swatch c{index % plots.COLOURS}"></span>{_text(model.label)}'
    if model.device != "cpu":
        name += f' <span class="soft">{_text(model.device)}</span>'
    return [
        name,
        _estimate(write.estimate(quality.perplexity) if quality else "-"),
        _estimate(write.estimate(quality.kld) if quality else "-"),
        _estimate(write.estimate(quality.kld99) if quality else "-"),
        _estimate(write.percent(quality.top1) if quality else "-"),
        write.size(model.weight_bytes),
        "-" if bits is None else f"{bits:.2f}",
        write.rate(None if model.prefill is None else model.prefill.median),
        write.rate(None if model.decode is None else model.decode.median),
        write.size(model.peak_memory_bytes),
    ]


def _estimate(text: str) -> str:
    """An estimate with its error on a line of its own."""
    value, plus_minus, error = text.partition(" ± ")
    unit = " %" if plus_minus and error.endswith(" %") else ""
    error = error.removesuffix(unit)
    return f"{value}{unit}" + (f"<small>± {error}</small>" if plus_minus else "")


# -- plots -------------------------------------------------------------------------------------------


def _trade_offs(evaluation: Evaluation) -> str:
    figures = [
        _trade_off(evaluation, "Quality against size", "size, MB", lambda model: model.weight_bytes / 1e6),
        _trade_off(
            evaluation,
            "Quality against speed",
            "decode, tokens/s",
            lambda model: None if model.decode is None else model.decode.median,
        ),
    ]
    shown = "".join(figure for figure in figures if figure)
    if not shown:
        return ""
    return f'<h2>Quality against size and speed</h2><div class="grid2">{shown}</div>'


def _trade_off(
    evaluation: Evaluation, name: str, x_title: str, value: Callable[[ModelResult], float | None]
) -> str:
    points = []
    for index, model in enumerate(evaluation.models):
        quality, x = model.quality, value(model)
        if quality is None or quality.kld is None or quality.kld.value <= 0 or x is None:
            continue
        hint = f"{model.label}: KL divergence {write.estimate(quality.kld)}, {x_title} {write.number(x)}"
        points.append(plots.Point(x, quality.kld.value, index, model.label, hint))
    if not points:
        return ""
    at = value(evaluation.reference)
    picture = plots.scatter(
        points,
        x_title=x_title,
        y_title="KL divergence, nats",
        name=name,
        x_mark=None if at is None else (at, "reference"),
    )
    return f"<figure><h3>{name}</h3>{picture}</figure>"


def _layers(evaluation: Evaluation) -> str:
    """Relative errors of the weights: a plot for each kind of matrix, a table of those of no layer."""
    compared = [(index, model) for index, model in enumerate(evaluation.models) if model.weight_errors]
    if not compared:
        return ""
    kinds: dict[str, list[plots.Line]] = {}
    for index, model in compared:
        by_kind: dict[str, list[tuple[float, float | None]]] = {}
        for error in model.weight_errors:
            if error.layer is not None:
                by_kind.setdefault(error.kind, []).append((float(error.layer), error.relative_error))
        for kind, values in by_kind.items():
            kinds.setdefault(kind, []).append(plots.Line(sorted(values), index, model.label))
    drawn = {
        kind: series for kind, series in kinds.items() if any(y for line in series for _, y in line.points)
    }
    highest = max((y or 0.0 for s in drawn.values() for line in s for _, y in line.points), default=0.0)
    figures = [
        "<figure><h3>"
        + _text(kind)
        + "</h3>"
        + plots.lines(
            series, x_title="layer", y_title="relative error", name=f"Error of {kind}",
            y_axis=plots.axis([0.0, highest]),
        )
        + "</figure>"
        for kind, series in drawn.items()
    ]  # fmt: skip
    legend = " ".join(
        f'<span class="swatch c{index % plots.COLOURS}"></span>{_text(model.label)}&ensp;'
        for index, model in compared
    )
    intro = (
        '<p class="soft">Root of the squared differences from the reference\'s weights over that of its'
        " squares; kinds without any error are left out.</p>"
    )
    pictures = f'<div class="grid3">{"".join(figures)}</div>' if figures else ""
    return f"<h2>Error of the weights, layer by layer</h2>{intro}<p>{legend}</p>{pictures}" + _outside(
        compared
    )


def _outside(compared: Sequence[tuple[int, ModelResult]]) -> str:
    names = dict.fromkeys(e.name for _, model in compared for e in model.weight_errors if e.layer is None)
    found = {(index, e.name): e for index, model in compared for e in model.weight_errors}
    rows = []
    for name in names:
        cells = [_text(name)]
        for index, _ in compared:
            error = found.get((index, name))
            cells.append(
                "-" if error is None else f"{error.relative_error:.3g} <code>{_text(error.encoding)}</code>"
            )
        rows.append(cells)
    if not rows:
        return ""
    return _table(["Of no layer", *(_text(model.label) for _, model in compared)], rows)


# -- flips -------------------------------------------------------------------------------------------


def _flips(evaluation: Evaluation) -> str:
    parts = [
        f"<details{' open' if len(evaluation.others) == 1 else ''}><summary>{_text(model.label)}:"
        f" {model.quality.flips:,} of {model.quality.tokens:,} tokens</summary>"
        + _table(
            ("Context", "Text", "Reference", "Model", "Loss"),
            [_flip(flip) for flip in model.flips],
            text=(0, 1, 2, 3),
        )
        + "</details>"
        for model in evaluation.others
        if model.quality is not None and model.quality.flips
    ]
    if not parts:
        return ""
    intro = (
        '<p class="soft">Tokens where a model thinks another one the most probable than the reference does.'
        " Listed are those where the reference was surest of its own: the loss is how much less probable"
        " the model's token is to it.</p>"
    )
    return f"<h2>Flips</h2>{intro}{''.join(parts)}"


def _flip(flip: Flip) -> list[str]:
    return [
        f'<span class="soft">{flip.position:,}</span> …{_text(flip.context)}',
        _token(flip.actual),
        f"{_token(flip.reference_token)}"
        f"<small>{flip.reference_probability:.1%}, in the model {flip.reference_token_in_model:.1%}</small>",
        f"{_token(flip.token)}"
        f"<small>{flip.probability:.1%}, in the reference {flip.token_in_reference:.1%}</small>",
        f"{flip.loss:.1%}",
    ]


def _token(text: str) -> str:
    return f'<span class="token">{_text(text)}</span>'


def _text(text: str) -> str:
    """Text as HTML, with control characters made visible."""
    return escape(write.printable(text))


# -- how it was measured -----------------------------------------------------------------------------


def _method(evaluation: Evaluation) -> str:
    stride = (
        "side by side; tokens after the first half of each count"
        if evaluation.stride is None
        else f"{evaluation.stride:,} tokens apart; the last {evaluation.stride:,} of each count"
    )
    load = evaluation.load_average
    facts = [
        ("Text", f"{evaluation.text}, sha256 {evaluation.text_sha256}"),
        ("Windows", f"{evaluation.windows:,} of {evaluation.window:,} tokens, {stride}"),
        ("Perplexity", "e to the mean negative log-likelihood of the tokens that count, ± standard error"),
        ("KL divergence", "of the model's next-token distribution from the reference's, nats, in float64"),
        ("Size", "stored bytes of the weights, without tokenizer"),
        ("Peak memory", "resident size of the model's own process after loading, a prefill and a decode"),
        ("Processor", evaluation.processor),
        ("Load before", "unknown" if load is None else f"{load:.2f}"),
        ("nybble", evaluation.version),
        ("Took", f"{evaluation.seconds:,.0f} s"),
    ]
    for model in evaluation.models:
        options = "".join(f", {name} {value}" for name, value in model.options.items())
        where = f"{model.device}, {model.threads or 'unknown number of'} threads{options}"
        rates = "".join(
            f"; {name} of {rate.tokens} tokens {rate.spread[0]:,.0f} to {rate.spread[1]:,.0f} a second"
            for name, rate in (("prefill", model.prefill), ("decode", model.decode))
            if rate is not None
        )
        facts.append((model.label, f"{model.model}: {model.format}, {where}{rates}"))
    items = "".join(f"<dt>{_text(name)}</dt><dd>{_text(text)}</dd>" for name, text in facts)
    return f"<h2>How it was measured</h2><dl>{items}</dl>"


def _table(header: Iterable[str], rows: Iterable[Sequence[str]], text: Sequence[int] = ()) -> str:
    """A table of cells that are HTML already; columns in ``text`` are broken into lines."""
    head = "".join(f"<th{TEXT if i in text else ''}>{name}</th>" for i, name in enumerate(header))
    body = "".join(
        "<tr>"
        + "".join(f"<td{TEXT if i in text else ''}>{cell}</td>" for i, cell in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
