"""How a report page looks: calm, at any width, in light and dark, on paper."""

from billhook.reports import charts

LIGHT = "--page:#fff;--ink:#1c2127;--soft:#59636e;--line:#dfe3e8;--tint:#f5f6f8;--mark:#0066a1"
DARK = "--page:#14171b;--ink:#e7eaee;--soft:#a2acb7;--line:#30363d;--tint:#1c2026;--mark:#6cb8ea"
PAGE = (
    f":root{{color-scheme:light dark;{LIGHT}}}"
    f"@media screen and (prefers-color-scheme:dark){{:root{{{DARK}}}}}"
    """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);overflow-wrap:anywhere;
  font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main,header,footer{max-width:53rem;margin:0 auto;padding:0 1rem}
header{padding-top:2rem}
h1{font-size:clamp(1.35rem,1.1rem + 1.4vw,1.9rem);line-height:1.2;letter-spacing:-.012em;margin:.2rem 0 1.4rem;
  text-wrap:balance}
h2{font-size:1.2rem;line-height:1.3;margin:0 0 .5rem}
h3{font-size:1rem;margin:1.4rem 0 .4rem}
section{margin:2.6rem 0 0}
p{margin:.5rem 0;max-width:44rem}
.soft,caption,figcaption,footer{color:var(--soft);font-size:.875rem}
.kind{color:var(--soft);font-size:.875rem;margin:0}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(9rem,100%),1fr));gap:1.4rem 1.5rem;margin:0;
  padding:1.2rem 0;border-block:1px solid var(--line)}
.figures div{display:flex;flex-direction:column}
.figures dt{font-size:.875rem;color:var(--soft);line-height:1.35}
.figures dd{margin:0}
.figures .value{font-size:2.1rem;line-height:1.25;font-weight:600;letter-spacing:-.02em;white-space:nowrap;
  font-variant-numeric:tabular-nums}
.figures .conditions{font-size:.8125rem;line-height:1.4;color:var(--soft)}
.todo{background:var(--tint);border-radius:.4rem;padding:.8rem 1rem;margin:1.2rem 0 0;max-width:none}
.todo code{display:block;margin-top:.3rem}
code,pre{font:.8125rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{background:var(--tint);border-radius:.4rem;padding:.8rem 1rem;margin:.6rem 0;overflow-x:auto;white-space:pre-wrap}
.scroll{overflow-x:auto;margin:.4rem 0 .8rem;overflow-wrap:normal}
.scroll:focus-visible{outline:2px solid var(--mark);outline-offset:2px}
table{border-collapse:collapse;width:100%;font-size:.875rem;line-height:1.35;font-variant-numeric:tabular-nums}
caption{text-align:left;padding:0 0 .4rem}
caption span{position:sticky;left:0;display:inline-block;max-width:min(51rem,100vw - 2rem)}
th,td{padding:.42rem 0 .42rem .9rem;text-align:right;vertical-align:top;white-space:nowrap;
  border-bottom:1px solid var(--line)}
th{font-weight:400}
thead th,thead td{font-weight:600;vertical-align:bottom;border-bottom:1px solid var(--soft);white-space:normal}
th:first-child{text-align:left;white-space:normal}
th:first-child{padding-left:0;min-width:8.2rem;overflow-wrap:anywhere}
th small,td small{display:block;color:var(--soft);font-size:.75rem}
tr.group th{font-weight:600;padding-top:1.1rem}
tr.best td,tr.best th{font-weight:600}
.pairs th{width:11rem;color:var(--soft)}
.pairs td{text-align:left;white-space:normal;overflow-wrap:anywhere}
.few{width:auto;min-width:16rem}
.numbers th:first-child{min-width:3rem;white-space:nowrap}
figure{margin:1rem 0 1.6rem}
figcaption{margin-bottom:.6rem;max-width:44rem}
figcaption b{display:block;color:var(--ink);font-weight:600;font-size:1rem}
.texts{display:grid;gap:.8rem 1.6rem;grid-template-columns:repeat(auto-fit,minmax(min(15rem,100%),1fr))}
.texts h4{margin:0;font-size:.8125rem;font-weight:400;color:var(--soft)}
blockquote{margin:.15rem 0 0;padding-left:.8rem;border-left:2px solid var(--line);white-space:pre-wrap;font-size:.9375rem}
details{margin:.8rem 0}
summary{cursor:pointer;color:var(--mark);font-size:.9375rem}
footer{margin-top:3rem;padding-bottom:2.5rem}
@media(max-width:30rem){.figures{grid-template-columns:1fr 1fr;gap:1.2rem 1rem}.figures .value{font-size:1.7rem}
  .figures .long{grid-column:1/-1}.pairs th{width:6.5rem;min-width:6.5rem}th,td{padding-left:.5rem}
  table{font-size:.8125rem}td,thead th{white-space:normal}td small{white-space:nowrap}th:first-child{min-width:6.6rem}tbody th{position:sticky;left:0;
  background:var(--page)}.group th{position:static}}
@media print{@page{margin:16mm}body{font-size:10.5pt}section,figure,article{break-inside:auto}figure,tr,article{break-inside:avoid}
  h2,h3,h2+p,caption{break-after:avoid}.scroll{overflow:visible}details::details-content{content-visibility:visible;
  block-size:auto;opacity:1}summary{list-style:none;color:inherit}}
"""
)
STYLE = PAGE + charts.STYLE
