"""One experiment per method: its claim, ours and the baseline side by side, and the bar."""
