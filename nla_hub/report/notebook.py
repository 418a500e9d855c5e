"""Explanations as static HTML, for notebooks and as a file: coloured tokens and a table, without a script.

A notebook that is opened again runs no script, and many viewers drop styles: so each token carries its colours and, as
its title, its explanation. With styles a focused token shows it too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby

from nla_hub.report import scale
from nla_hub.results import Explanation, Explanations

TOKENS = 1500
"""Tokens that are shown coloured; the table has its own bound."""

STYLE = (
    ".nla{border-collapse:collapse;font:14px/1.45 system-ui,sans-serif}"
    ".nla th,.nla td{padding:.3em .7em;text-align:left;vertical-align:top;border-bottom:1px solid #8884}"
    ".nla code{font:13px ui-monospace,monospace;background:#8882;padding:0 .25em;border-radius:3px}"
    ".nla .n{text-align:right;font-variant-numeric:tabular-nums}.nla .q{opacity:.75}"
    ".nla-text{font:15px/1.9 system-ui,sans-serif;white-space:pre-wrap;overflow-wrap:anywhere;position:relative;max-width:72em}"
    ".nla-text span[tabindex]:focus{outline:3px solid #2f7de1;outline-offset:1px}"
    ".nla-text span[tabindex]:focus::after{content:attr(title);position:absolute;left:0;right:0;top:100%;z-index:9;"
    "background:#fff;color:#1d1a16;border:1px solid #857f73;border-radius:6px;padding:.5em .8em;font-size:14px;"
    "line-height:1.45}"
    ".nla-text span[tabindex]{box-shadow:inset 1px 0 #8885}.nla-note{font:13px/1.5 system-ui,sans-serif;margin:.3em 0}"
)

UNUSABLE = "border:1px dashed currentColor;text-decoration:line-through"
UNSCORED = "border-bottom:2px dotted currentColor"


def table(rows: Explanations, *, at_most: int = 200) -> str:
    """Coloured tokens and an HTML table of at most `at_most` rows."""
    head = "".join(f"<th>{name}</th>" for name in ("position", "token", "explanation", "cosine", "flags"))
    body = "".join(_row(row) for row in rows[:at_most])
    rest = f"<p class=q>... and {len(rows) - at_most} more rows</p>" if len(rows) > at_most else ""
    summary = escape(str(rows.fve()))
    counts = ", ".join(f"{n} {status}" for status, n in sorted(rows.counts().items()))
    return (
        f"<style>{STYLE}</style>{tokens(rows)}"
        f"<table class=nla><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{rest}"
        f"<p>{summary}; {escape(counts)}</p>"
    )


def page(rows: Explanations, *, title: str = "Explanations") -> str:
    """A complete HTML document with all rows."""
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name=viewport content="width=device-width, initial-scale=1"><style>:root{color-scheme:light dark}</style>'
        f"<title>{escape(title)}</title></head><body>{table(rows, at_most=len(rows))}</body></html>"
    )


def tokens(rows: Explanations) -> str:
    """The tokens of each document in a paragraph, coloured by their error; empty where no row has a token.

    Text between explained tokens is not known here: three dots stand for it.
    """
    known = [row for row in rows if row.token is not None and row.position is not None and row.position >= 0]
    shown = known[:TOKENS]
    if not shown:
        return ""
    by = scale.denominator(rows.reference)
    texts = [_text(list(group), by) for _, group in groupby(shown, key=lambda row: row.doc_id)]
    more = f"<p class=nla-note>... and {len(known) - TOKENS} more tokens</p>" if len(known) > TOKENS else ""
    return f"{_legend(by, rows)}{''.join(texts)}{more}"


def _legend(by: float, rows: Explanations) -> str:
    steps = "".join(
        f'<span style="background-color:{back};color:{text};padding:1px 7px">{escape(label)}</span>'
        for label, (back, text) in zip(scale.LABELS, scale.LIGHT, strict=True)
    )
    reference = rows.reference
    has_reference = reference is not None and reference.raw_variance == by
    unit = f"mse / {by:.3f}, its part of 1 - FVE" if has_reference else "mse / 2: there is no reference"
    return (
        f"<p class=nla-note>Error of a token ({unit}): {steps} "
        f'<span style="{UNUSABLE}">no usable text</span> <span style="{UNSCORED}">not measured</span></p>'
    )


def _text(rows: Sequence[Explanation], by: float) -> str:
    return f'<p class=nla-text dir="auto">{"".join(_tokens(rows, by))}</p>'


def _tokens(rows: Sequence[Explanation], by: float) -> Iterator[str]:
    expected = 0
    for position, group in groupby(sorted(rows, key=_place), key=lambda row: row.position or 0):
        if position > expected:
            yield " \N{HORIZONTAL ELLIPSIS} "
        yield _token(list(group), by)
        expected = position + 1


def _place(row: Explanation) -> tuple[int, int]:
    return row.position or 0, row.sample


def _token(samples: Sequence[Explanation], by: float) -> str:
    errors = [row.mse / by for row in samples if row.mse is not None]
    if errors:
        back, text = scale.LIGHT[scale.step_of(sum(errors) / len(errors))]
        style = f"background-color:{back};color:{text}"
    else:
        style = UNSCORED if any(row.status == "ok" for row in samples) else UNUSABLE
    words = "\n".join(_words(row, by) for row in samples)
    return f'<span style="{style}" tabindex=0 title="{escape(words)}">{escape(samples[0].token or "")}</span>'


def _words(row: Explanation, by: float) -> str:
    score = "not measured" if row.mse is None else f"{row.mse / by:.3f}"
    return f"{row.text if row.text is not None else f'({row.status}) {row.raw}'} [error {score}]"


def _row(row: Explanation) -> str:
    position = "" if row.position is None or row.position < 0 else str(row.position)
    token = "" if row.token is None else f"<code>{escape(row.token)}</code>"
    text = escape(row.text) if row.text is not None else f"<span class=q>({row.status}) {escape(row.raw)}</span>"
    score = "<span class=q>not measured</span>" if row.cosine is None else f"{row.cosine:.3f}"
    flags = escape(", ".join(row.flags))
    return f"<tr><td class=n>{position}<td>{token}<td>{text}<td class=n>{score}<td class=q>{flags}</tr>"
