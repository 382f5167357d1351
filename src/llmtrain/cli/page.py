"""Blocks as one page of HTML: all in one file, no script, nothing from the network, dark where the reader's system is.

All text is escaped. Colours alone say nothing: what is learned is underlined too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from llmtrain._version import __version__
from llmtrain.cli.blocks import Bars, Block, Figures, Lines, Passage, Piece, Table, has_supervision, visible
from llmtrain.config.errors import ConfigError

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --soft: #6a737d; --line: #d8dee4; --bar: #4a7fd0;
  --learned: #0a6b2d; --learned-paper: #dff5e4; --control: #7a3e9d; --fault: #b3261e; --warning: #8a5a00; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --paper: #14171a; --soft: #9aa4ae; --line: #32383f; --bar: #6f9fe8; --learned: #7ee2a0;
    --learned-paper: #12351f; --control: #d0a2ee; --fault: #ff8a80; --warning: #f2c14e; } }
body { margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
h3 { font-size: .95rem; margin: 1.2rem 0 .3rem; font-weight: 600; overflow-wrap: anywhere; }
h4 { font-size: .8rem; margin: .6rem 0 .2rem; color: var(--soft); font-weight: 500; }
table { border-collapse: collapse; } th, td { padding: .2rem .9rem .2rem 0; text-align: left; vertical-align: top; }
th { font-weight: 500; color: var(--soft); white-space: nowrap; } td { overflow-wrap: anywhere; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.bars td:last-child { width: 100%; } .bar { background: var(--bar); height: .8rem; min-width: 1px; border-radius: 2px; }
.scroll { overflow-x: auto; } ul { padding-left: 1.2rem; } li { overflow-wrap: anywhere; white-space: pre-wrap; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border-left: 3px solid var(--line); padding: .1rem 0 .1rem .8rem;
  margin: .2rem 0; font: 13px/1.5 ui-monospace, monospace; }
mark { color: var(--learned); background: var(--learned-paper); text-decoration: underline; border-radius: 2px; }
.control { color: var(--control); } .fault { color: var(--fault); } .warning { color: var(--warning); }
footer { margin-top: 3rem; color: var(--soft); font-size: .8rem; }
"""


def write_page(path: str, *, title: str, blocks: Sequence[Block]) -> None:
    """Write the blocks to the file `path`. Raises ConfigError where that cannot be."""
    try:
        Path(path).write_text(as_page(title=title, blocks=blocks), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--html {path}: cannot be written ({error.strerror or error})") from error


def as_page(*, title: str, blocks: Sequence[Block]) -> str:
    """The page."""
    body = "\n".join(line for block in _with_legend(blocks) for line in _lines(block))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{_text(title)}</h1>\n{body}\n"
        f"<footer>llmtrain {escape(__version__)}</footer>\n</body>\n</html>\n"
    )


def _with_legend(blocks: Sequence[Block]) -> Iterator[Block | str]:
    has_legend = not has_supervision(blocks)
    for block in blocks:
        if isinstance(block, Passage) and not has_legend:
            has_legend = True
            yield (
                '<p>What is learned is <mark>marked</mark>; <span class="control">control tokens</span> have a colour '
                "of their own.</p>"
            )
        yield block


def _lines(block: Block | str) -> Iterator[str]:
    match block:
        case str():
            yield block
        case Figures(rows):
            yield '<table class="figures">'
            yield from (f'<tr><th scope="row">{_text(name)}</th><td>{_text(value)}</td></tr>' for name, value in rows)
            yield "</table>"
        case Table(title, head, rows):
            yield f'<section><h2>{_text(title)}</h2><div class="scroll"><table>'
            yield _row("th", head)
            yield from (_row("td", row) for row in rows)
            yield "</table></div></section>"
        case Bars(title, rows, note):
            most = max((count for _, count in rows), default=0) or 1
            yield f"<section><h2>{_text(title)}</h2>"
            if note:
                yield f"<p>{_text(note)}</p>"
            yield '<table class="bars">'
            for label, count in rows:
                bar = f'<div class="bar" style="width: {100 * count / most:.1f}%"></div>' if count else ""
                yield f'<tr><th scope="row" class="number">{_text(label)}</th>'
                yield f'<td class="number">{count:,}</td><td>{bar}</td></tr>'
            yield "</table></section>"
        case Lines(title, lines, kind):
            yield f'<section class="{kind}"><h2>{_text(title)}</h2><ul>'
            yield from (f"<li>{_text(line)}</li>" for line in lines)
            yield "</ul></section>"
        case Passage(caption, sections):
            yield f"<section><h3>{_text(caption)}</h3>"
            for heading, pieces in sections:
                yield f"<h4>{_text(heading)}</h4>" if heading is not None else ""
                yield f"<pre>{''.join(map(_piece, pieces))}</pre>"
            yield "</section>"


def _row(element: str, cells: Sequence[str]) -> str:
    """Names stand to the left, figures to the right."""
    kinds = ["", *([' class="number"'] * (len(cells) - 1))]
    inner = (f"<{element}{kind}>{_text(cell)}</{element}>" for kind, cell in zip(kinds, cells, strict=True))
    return f"<tr>{''.join(inner)}</tr>"


def _piece(piece: Piece) -> str:
    text = _text(piece.text)
    text = f'<span class="control">{text}</span>' if piece.control else text
    return f"<mark>{text}</mark>" if piece.supervised else text


def _text(text: str) -> str:
    return escape(visible(text))
