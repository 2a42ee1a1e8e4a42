"""What was done and measured: as a record, on the terminal, as a model card and as report.html.

card              README.md of a checkpoint: the model card
charts            Charts as inline SVG text, from plain numbers: curves with error bars, and steps layer by layer
commands          The command line that makes a result again, from its record
cut_tables        The rows that say what a prune did: to the whole model, and layer by layer
formatting        Numbers as people read them; what is no number is a dash
gate_tables       The rows of methods whose gates learn before units go
headline          The few large figures at the top of a report: size, speed, and what it cost
history           What billhook.json says was done to a model: every key that is read back, and what it should be
kinds             What a value of a record may be, and how strictly a part of it is read
markup            The pieces of a report page: text that is escaped on its way in, tables, figures, sections
page              report.html: one file, made for a person, from report.json and nothing else
quantized         What few bits came to, in rows
quantized_section What few bits came to, as a section of a page
records           The record of a result, as plain data: what report.json and billhook.json hold
recovery_section  The sections of a report page about training after a cut: its course
recovery_tables   What training after a cut did, in words and rows for a terminal
scales            Where a number lies on an axis, and which round numbers are written beside it
search_history    What billhook.json says of a search: every key that is read back, and its type
search_section    The section of a report page about a search: what it found, the way there
search_tables     What a search has found, in words and rows for a terminal, a Markdown card and a page alike
style             How a report page looks: calm, at any width, in light and dark, on paper
tables            The rows of a report, as text for a terminal, a Markdown card and a page alike
terminal          Tables on the terminal
"""
