from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """What fsync is for, a power cut, no test can cause; on a busy disk it takes most of the time."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
