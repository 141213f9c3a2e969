"""Self-contained HTML pages: one layout, escaped text, charts as inline SVG."""
