"""Reports as people read them: tables, charts, and one self-contained page."""
