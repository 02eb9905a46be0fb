"""What the server remembers: SQLite for the records, a folder beside it for the files.

``data/assets/ID`` holds an upload (portrait, speech, ...), ``data/videos/ID`` the results of a job. Files get names of
our own, never those that a client sent.
"""

from __future__ import annotations

import json
import secrets
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flowvqtalker.errors import UserError

__all__ = ["ACTIVE", "ORIGINAL", "TEMPORARY", "Row", "Store", "new_id"]

#: States of a job that has not ended.
ACTIVE = ("queued", "in_progress")
#: Begin of the names of folders that live as long as a request.
TEMPORARY = "request-"
#: Name of an upload in its folder.
ORIGINAL = "original"

Row = dict[str, Any]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS assets (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, kind TEXT NOT NULL, info TEXT NOT NULL, consent REAL,
    inline INTEGER NOT NULL, created REAL NOT NULL, used REAL NOT NULL);
CREATE TABLE IF NOT EXISTS videos (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, status TEXT NOT NULL, request TEXT NOT NULL, assets TEXT NOT NULL,
    frames INTEGER NOT NULL, seconds REAL NOT NULL, samples INTEGER NOT NULL, discarded TEXT NOT NULL DEFAULT '[]',
    size TEXT, error TEXT, warnings TEXT NOT NULL DEFAULT '[]', consent REAL NOT NULL, tries INTEGER NOT NULL DEFAULT 0,
    created REAL NOT NULL, started REAL, ended REAL);
CREATE INDEX IF NOT EXISTS videos_by_owner ON videos (owner, created);
CREATE INDEX IF NOT EXISTS videos_by_status ON videos (status);
CREATE TABLE IF NOT EXISTS keys (
    owner TEXT NOT NULL, key TEXT NOT NULL, digest TEXT NOT NULL, video TEXT NOT NULL, PRIMARY KEY (owner, key));
CREATE TABLE IF NOT EXISTS sessions (id TEXT PRIMARY KEY, token TEXT NOT NULL, used REAL NOT NULL);
"""
_JSON = ("info", "request", "assets", "discarded", "error", "warnings")


def new_id(kind: str) -> str:
    """An identifier that cannot be guessed (128 bits)."""
    return f"{kind}_{secrets.token_hex(16)}"


class Store:
    """The records and files of a server. Any thread may use it; one process at a time.

    Arguments:
        folder: made if it is missing.

    Raises:
        UserError: if the folder cannot be used, or another server uses it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            for name in ("assets", "videos"):
                (folder / name).mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise UserError(f"data folder {folder} cannot be used ({error.strerror}); give another --data") from error
        self._lock = threading.RLock()
        # Autocommit: every statement is durable once it returns, whatever kills the process.
        self._database = sqlite3.connect(
            folder / "jobs.sqlite3", check_same_thread=False, isolation_level=None, timeout=1
        )
        self._database.row_factory = sqlite3.Row
        pragmas = "PRAGMA locking_mode=EXCLUSIVE; PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;"
        try:
            self._database.executescript(pragmas + _SCHEMA)
            self._recover()  # its write takes the lock, which stays
        except sqlite3.DatabaseError as error:
            self._database.close()
            why = "is used by another server; stop it or" if "locked" in str(error) else f"is damaged ({error});"
            raise UserError(f"data folder {folder} {why} give another --data") from error

    def close(self) -> None:
        """Let go of the folder."""
        with self._lock:
            self._database.close()

    def _recover(self) -> None:
        """After a kill: jobs that ran wait again, and files without a record go."""
        self.run("UPDATE videos SET status = 'queued', tries = 0 WHERE status = 'in_progress'")
        for name in ("assets", "videos"):
            known = {row["id"] for row in self.all(f"SELECT id FROM {name}")}
            for path in (self.folder / name).iterdir():
                if path.name not in known:
                    shutil.rmtree(path, ignore_errors=True)
        for path in self.folder.glob(f"{TEMPORARY}*"):
            shutil.rmtree(path, ignore_errors=True)

    def all(self, query: str, *values: Any) -> list[Row]:
        """The rows of a query, with JSON columns decoded."""
        with self._lock:
            rows = [dict(row) for row in self._database.execute(query, values)]
        for row in rows:
            for name in _JSON:
                if row.get(name) is not None:
                    row[name] = json.loads(row[name])
        return rows

    def one(self, query: str, *values: Any) -> Row | None:
        """The first row of a query."""
        return next(iter(self.all(query, *values)), None)

    def run(self, query: str, *values: Any) -> int:
        """Run a statement; returns the number of rows that it changed."""
        with self._lock:
            return self._database.execute(query, values).rowcount

    def insert(self, table: str, **values: Any) -> None:
        """Insert a row; values of JSON columns are encoded."""
        coded = {name: json.dumps(value) if name in _JSON else value for name, value in values.items()}
        marks = ", ".join("?" * len(coded))
        self.run(f"INSERT INTO {table} ({', '.join(coded)}) VALUES ({marks})", *coded.values())

    def asset_folder(self, asset: str) -> Path:
        """Folder of an upload."""
        return self.folder / "assets" / asset

    def video_folder(self, video: str) -> Path:
        """Folder of a job's results."""
        return self.folder / "videos" / video

    def asset(self, owner: str, asset: str, kind: str) -> Row | None:
        """An upload of a client."""
        return self.one("SELECT * FROM assets WHERE id = ? AND owner = ? AND kind = ?", asset, owner, kind)

    def video(self, owner: str, video: str) -> Row | None:
        """A job of a client."""
        return self.one("SELECT * FROM videos WHERE id = ? AND owner = ?", video, owner)

    def is_full(self, owner: str, most: int, most_of_owner: int) -> bool:
        """Whether the queue takes no more jobs, or no more of this client."""
        rows = self.all("SELECT owner, COUNT(*) AS n FROM videos WHERE status IN (?, ?) GROUP BY owner", *ACTIVE)
        counts = {row["owner"]: row["n"] for row in rows}
        return bool(sum(counts.values()) >= most or counts.get(owner, 0) >= most_of_owner)

    def add_video(self, row: Row, most: int, most_of_owner: int) -> bool:
        """Insert a job unless the queue is full; returns whether it was."""
        with self._lock:
            if self.is_full(row["owner"], most, most_of_owner):
                return False
            self.insert("videos", **row)
            self.touch(row["assets"].values())
            return True

    def touch(self, assets: Iterable[str]) -> None:
        """Note that uploads were used, which keeps them longer."""
        for asset in assets:
            self.run("UPDATE assets SET used = ? WHERE id = ?", time.time(), asset)

    def users(self, asset: str, statuses: tuple[str, ...] | None = None) -> int:
        """Number of jobs that name an upload, of all states or of some."""
        rows = self.all("SELECT status, assets FROM videos WHERE assets LIKE ?", f'%"{asset}"%')
        return sum(statuses is None or row["status"] in statuses for row in rows)

    def remove_asset(self, asset: str) -> None:
        """Delete an upload and its files."""
        self.run("DELETE FROM assets WHERE id = ?", asset)
        shutil.rmtree(self.asset_folder(asset), ignore_errors=True)

    def remove_video(self, video: str) -> None:
        """Delete a job, its files, and the uploads that came with it and that no other job names."""
        row = self.one("SELECT * FROM videos WHERE id = ?", video)
        self.run("DELETE FROM videos WHERE id = ?", video)
        self.run("DELETE FROM keys WHERE video = ?", video)
        shutil.rmtree(self.video_folder(video), ignore_errors=True)
        for asset in (row or {"assets": {}})["assets"].values():
            found = self.one("SELECT inline FROM assets WHERE id = ?", asset)
            if found and found["inline"] and not self.users(asset):
                self.remove_asset(asset)

    def expire(self, keep: float) -> int:
        """Delete what ended, or was last used, more than ``keep`` seconds ago; returns how much that is."""
        before = time.time() - keep
        ended = self.all("SELECT id FROM videos WHERE ended < ?", before)
        for row in ended:
            self.remove_video(row["id"])
        unused = [row["id"] for row in self.all("SELECT id FROM assets WHERE used < ?", before)]
        unused = [asset for asset in unused if not self.users(asset)]
        for asset in unused:
            self.remove_asset(asset)
        self.run("DELETE FROM sessions WHERE used < ?", before - 30 * 86_400)
        return len(ended) + len(unused)
