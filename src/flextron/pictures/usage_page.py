"""A web page that shows how many MLP neurons each token of a text ran. No torch and no matplotlib here."""

from __future__ import annotations

import html
from collections.abc import Iterator

from flextron.pictures.usage import COLORS, INK, TokenUsage, color_scale, colors, summary, verdict

_CONTROLS = {code: 0x2400 + code for code in range(32) if code not in b"\t\n"} | {0x7F: 0x2421}
_STYLE = f"""
:root {{ color-scheme: light; }}
body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.5 system-ui, sans-serif;
  color: {INK}; background: #ffffff; }}
h1 {{ font-size: 1.4rem; }}
.scale {{ display: flex; flex-wrap: wrap; gap: .6rem; align-items: center; }}
.scale b {{ flex: 0 1 14rem; min-width: 6rem; height: 1.1rem; border: 1px solid #bbbbbb;
  background: linear-gradient(to right, {", ".join(COLORS)}); }}
.text {{ font: 1rem/2 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; tab-size: 4; }}
.text span {{ padding: .2em 0; border-radius: .2em; box-shadow: inset -1px 0 #ffffff; }}
.text span:empty::before {{ content: "\\2205"; color: #555555; }}
.text i::before {{ content: "\\21b5"; font-style: normal; color: #555555; }}
.note {{ border-left: .3rem solid #c2622d; padding-left: .7rem; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: .2rem .8rem; border-bottom: 1px solid #dddddd; text-align: right; }}
th:first-child, td:first-child {{ padding-left: 0; text-align: left; font-weight: normal; }}
"""


def usage_html(usage: TokenUsage) -> str:
    """Write one HTML page that needs no other file: the text with tokens coloured by share, and a table of classes.

    Under the pointer, a token shows its share and its neurons in every layer. Control characters other than tab and
    newline become their symbols, so that the page is valid.
    """
    low, high = color_scale(usage.shares_T)
    warning = verdict(usage)
    note = f'<p class="note">{html.escape(warning)}</p>\n' if warning else ""
    rows = "".join(
        f'<tr><th scope="row">{name}</th><td>{count}</td><td>{share:.1%}</td></tr>\n'
        for name, (count, share) in usage.by_class().items()
    )
    about = html.escape(summary(usage).translate(_CONTROLS))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>MLP neurons of each token</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>MLP neurons of each token</h1>
<p>{about}.</p>
{note}<p class="scale"><span>{low:.0%}</span><b></b><span>{high:.0%} of the MLP neurons, mean over layers</span></p>
<p class="text" lang="" dir="auto">{"".join(_spans(usage))}</p>
<h2>By class of token</h2>
<table>
<tr><th scope="col">class</th><th scope="col">tokens</th><th scope="col">share of the MLP neurons</th></tr>
{rows}</table>
</body>
</html>
"""


def _spans(usage: TokenUsage) -> Iterator[str]:
    shares_T = usage.shares_T
    for token, share, color, neurons_L in zip(
        usage.tokens, shares_T, colors(shares_T), usage.neurons_LT.T.tolist(), strict=True
    ):
        text = html.escape(token.translate(_CONTROLS)).replace("\n", "<i></i>\n")
        title = f"{share:.1%} of the MLP neurons; layers 0 to {len(neurons_L) - 1}: {' '.join(map(str, neurons_L))}"
        yield f'<span style="background:{color}" title="{title}">{text}</span>'
