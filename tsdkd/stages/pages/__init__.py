"""Self-contained HTML pages: one layout, charts as inline SVG, everything a rollout says escaped."""
