"""No decision is lost, none counts twice, and a repeat changes nothing."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from evaluation.ledger import Conflict, Entry, Ledger, served


def promote(candidate, **more):
    return Entry(kind="promote", candidate=candidate, **more)


def reject(candidate):
    return Entry(kind="reject", candidate=candidate)


def rollback(candidate):
    return Entry(kind="rollback", candidate=candidate)


@pytest.fixture(params=["disk", "object store"])
def ledger(request, tmp_path):
    url = str(tmp_path) if request.param == "disk" else f"memory://{tmp_path.name}"
    return Ledger(url, "shapes")


def test_an_empty_ledger_has_no_champion(ledger):
    assert ledger.entries() == ()
    assert ledger.champion() is None
    assert ledger.previous() is None
    with pytest.raises(ValueError, match="no model served before None"):
        ledger.rollback()


def test_entries_say_what_was_decided_and_against_whom(ledger):
    verdict = {"promote": True, "checks": [{"name": "facts.infra", "got": None}]}
    first = ledger.append(promote("a", verdict=verdict), 0)
    assert (first.number, first.champion_before, first.verdict) == (1, None, verdict)
    assert first.time.endswith("+00:00")
    second = ledger.append(reject("b"), 1)
    third = ledger.append(promote("c"), 2)
    assert (second.champion_before, third.champion_before) == ("a", "a")
    again = Ledger(ledger.url.rsplit("/", 1)[0], "shapes")
    assert again.entries() == (first, second, third)
    assert (again.champion(), again.previous()) == ("c", "a")


def test_a_decision_against_an_older_champion_is_a_conflict(ledger):
    late = Ledger(ledger.url.rsplit("/", 1)[0], "shapes")
    seen = len(late.entries())
    ledger.append(promote("a"), 0)
    with pytest.raises(Conflict, match="entry 1 was written by another run"):
        late.append(promote("b"), seen)
    assert ledger.champion() == "a"
    assert late.append(promote("b"), 1).champion_before == "a"
    with pytest.raises(Conflict):
        ledger.append(reject("c"), 5)  # nothing there to have been seen


def test_a_repeat_changes_nothing(ledger):
    first = ledger.append(promote("a"), 0)
    ledger.append(reject("b"), 1)
    assert ledger.append(promote("a"), 2) == first
    assert ledger.append(promote("a"), 0) == first  # also by one who read long ago
    assert len(ledger.entries()) == 2


def test_rolling_back_returns_to_the_one_before(ledger):
    for number, name in enumerate("abc"):
        ledger.append(promote(name), number)
    entry = ledger.rollback()
    assert (entry.kind, entry.candidate, entry.champion_before) == ("rollback", "b", "c")
    assert (ledger.champion(), ledger.previous()) == ("b", "a")
    assert ledger.rollback(to="b") == entry
    ledger.append(promote("d"), 4)
    assert (ledger.champion(), ledger.previous()) == ("d", "b")
    ledger.rollback(to="a")
    assert (ledger.champion(), ledger.previous()) == ("a", None)
    with pytest.raises(ValueError, match="x cannot be rolled back to, it did not serve"):
        ledger.rollback(to="x")
    with pytest.raises(ValueError, match="no model served before a"):
        ledger.rollback()


def test_the_line_is_a_fold():
    history = [promote("a"), reject("x"), promote("b"), promote("a"), rollback("b"), promote("c")]
    assert served(history) == ("a", "b", "c")
    assert served(history[:4]) == ("a", "b", "a")


def test_settling_decides_again_against_the_new_champion(ledger):
    """Fault F17: another promotion between the decision and its entry."""
    other, asked = Ledger(ledger.url.rsplit("/", 1)[0], "shapes"), []

    def decide(champion):
        asked.append(champion)
        if len(asked) < 3:
            other.append(promote(f"other{len(asked)}"), len(other.entries()))
        return promote("mine") if champion != "other2" else reject("mine")

    entry = ledger.settle(decide)
    assert asked == [None, "other1", "other2"]
    assert (entry.kind, entry.number, entry.champion_before) == ("reject", 3, "other2")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Entry(kind="delete", candidate="a"), "promote, reject, rollback, got 'delete'"),  # pyright: ignore
        (lambda: promote(""), "needs a candidate"),
        (lambda: Ledger("x", "../y"), "ledger name '../y'"),
        (lambda: Ledger("x", ""), "ledger name ''"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_removed_or_foreign_entry_is_noticed(tmp_path):
    ledger = Ledger(str(tmp_path), "shapes")
    for number, name in enumerate("abc"):
        ledger.append(promote(name), number)
    (tmp_path / "shapes/000002.json").unlink()
    for reader in (ledger, Ledger(str(tmp_path), "shapes")):
        with pytest.raises(ValueError, match=r"found 000003.json where 000002.json should be"):
            reader.champion()
    (tmp_path / "shapes/000002.json").write_text('{"kind": "promote"}')
    with pytest.raises(ValueError, match=r"000002.json: not an entry"):
        Ledger(str(tmp_path), "shapes").champion()


RACER = """
import json, sys
from evaluation.ledger import Conflict, Entry, Ledger
url, me, names, count = sys.argv[1], sys.argv[2], sys.argv[3].split(","), int(sys.argv[4])
ledgers = [Ledger(url, name) for name in names]
won, asked = [], 0
sys.stdin.readline()
for n in range(count):
    for ledger in ledgers:
        def decide(champion):
            global asked
            asked += 1
            return Entry(kind="promote" if n % 3 else "reject", candidate=f"{me}-{n}",
                         verdict={"against": champion})
        won.append([ledger.name, ledger.settle(decide).number])
print(json.dumps({"won": won, "asked": asked}))
"""


def race(folder, processes, names, count):
    """Every process writes `count` entries into each ledger; what it won, how often it decided."""
    arguments = [str(folder), ",".join(names), str(count)]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, arguments[0], f"p{me}", *arguments[1:]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for me in range(processes)
    ]
    for process in running:  # all have read their arguments and wait
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    done = [json.loads(process.communicate()[0]) for process in running]
    assert all(process.returncode == 0 for process in running)
    return done


def check_race(folder, processes, names, count):
    done = race(folder, processes, names, count)
    for name in names:
        entries = Ledger(str(folder), name).entries()
        won = [number for one in done for ledger, number in one["won"] if ledger == name]
        assert sorted(won) == list(range(1, processes * count + 1))  # one winner for each number
        for before, entry in enumerate(entries):
            line = served(entries[:before])
            champion = line[-1] if line else None
            assert entry.number == before + 1
            assert entry.champion_before == champion  # decided against the champion of its time
            assert entry.verdict == {"against": champion}
        written = sorted(entry.candidate for entry in entries)
        assert written == sorted(f"p{p}-{n}" for p in range(processes) for n in range(count))
        assert not list(Path(folder, name).glob(".*"))
    return sum(one["asked"] for one in done) - len(names) * processes * count


def test_racing_processes_lose_nothing(tmp_path):
    conflicts = check_race(tmp_path, 4, ["shapes"], 60)
    assert conflicts > 0, "no two processes met: this race proves nothing"


@pytest.mark.slow
def test_ten_thousand_races(tmp_path):
    """Promise 6."""
    assert check_race(tmp_path, 4, [f"line{n}" for n in range(50)], 50) > 0


def test_a_writer_killed_before_its_entry_leaves_the_number_free(tmp_path):
    ledger = Ledger(str(tmp_path), "shapes")
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes/.000001.json.host.1.0.tmp").write_text("{")
    assert ledger.append(promote("a"), 0).number == 1
    assert ledger.entries() == (replace(promote("a"), number=1, time=ledger.entries()[0].time),)
