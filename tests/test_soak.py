"""The soak script: a killed run goes on to the same bits, and a difference of one number would be found."""

import pytest

from scripts import soak


def test_without_tensorboard_it_says_so_at_once(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        soak.main(["--kills", "1"])
    assert "pip install tensorboard" in capsys.readouterr().err


def test_one_kill_changes_nothing(capsys):
    assert soak.main(["--methods", "MoCov2", "--launches", "plain", "--workers", "0", "--kills", "1", "--images", "80"])
    *_, row = capsys.readouterr().out.splitlines()
    assert row.startswith("| plain | 0 | MoCov2 | SIG") and row.endswith("| nothing |")
