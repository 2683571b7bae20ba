from __future__ import annotations

import sys

from lamina.train import progress


def test_plain_lines_come_seldom_and_at_the_end(capsys, monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.display(10, start=2, unit="tokens") as shown:
        assert isinstance(shown, progress.Lines)
        for step, at in ((3, 1.0), (4, 12.0), (5, 13.0), (10, 14.0)):
            now[0] = at
            shown.update(step, 1.5, 2048.0)
    assert capsys.readouterr().err.splitlines() == [
        "step 4/10  loss 1.5000  2,048 tokens/s  36 s left",
        "step 10/10  loss 1.5000  2,048 tokens/s  0 s left",
    ]


def test_other_processes_show_nothing(capsys) -> None:
    with progress.display(3, shown=False) as shown:
        shown.update(3, 1.0, 1.0)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress.display(4) as shown:
        assert isinstance(shown, progress.Bar)
        shown.update(3, 0.25, 10.0)
        assert shown.progress.tasks[0].completed == 3
    assert "0.2500" in capsys.readouterr().err
