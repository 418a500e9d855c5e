"""Explanations as HTML: one self-contained page, or a table for notebooks. Everything is escaped."""

from __future__ import annotations

from html import escape

from nla_hub.results import Explanation, Explanations

STYLE = (
    ".nla{border-collapse:collapse;font:14px/1.45 system-ui,sans-serif}"
    ".nla th,.nla td{padding:.3em .7em;text-align:left;vertical-align:top;border-bottom:1px solid #8884}"
    ".nla code{font:13px ui-monospace,monospace;background:#8882;padding:0 .25em;border-radius:3px}"
    ".nla .n{text-align:right;font-variant-numeric:tabular-nums}.nla .q{opacity:.65}"
)


def table(rows: Explanations, *, at_most: int = 200) -> str:
    """An HTML table of at most `at_most` rows."""
    head = "".join(f"<th>{name}</th>" for name in ("position", "token", "explanation", "cosine", "flags"))
    body = "".join(_row(row) for row in rows[:at_most])
    rest = f"<p class=q>... and {len(rows) - at_most} more rows</p>" if len(rows) > at_most else ""
    summary = escape(str(rows.fve()))
    counts = ", ".join(f"{n} {status}" for status, n in sorted(rows.counts().items()))
    return (
        f"<style>{STYLE}</style><table class=nla><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{rest}"
        f"<p>{summary}; {escape(counts)}</p>"
    )


def page(rows: Explanations, *, title: str = "Explanations") -> str:
    """A complete HTML document with all rows."""
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title></head><body>{table(rows, at_most=len(rows))}</body></html>"
    )


def _row(row: Explanation) -> str:
    position = "" if row.position is None or row.position < 0 else str(row.position)
    token = "" if row.token is None else f"<code>{escape(row.token)}</code>"
    text = escape(row.text) if row.text is not None else f"<span class=q>({row.status}) {escape(row.raw)}</span>"
    score = "<span class=q>not measured</span>" if row.cosine is None else f"{row.cosine:.3f}"
    flags = escape(", ".join(row.flags))
    return f"<tr><td class=n>{position}<td>{token}<td>{text}<td class=n>{score}<td class=q>{flags}</tr>"
