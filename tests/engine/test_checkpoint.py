"""Checkpoint folders: whole or not there."""

import json

import pytest

from sgpo.engine.checkpoint import MANIFEST, Checkpoints, is_whole, write_folder
from sgpo.types import SgpoError


def _writer(text):
    def write(folder):
        (folder / "part").mkdir()
        (folder / "part" / "weights").write_text(text)

    return write


def _fail(folder):
    (folder / "half").write_text("x" * 100)
    raise OSError(28, "No space left on device")


def test_save_keeps_the_last_n_and_restores_the_newest(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep_last=2)
    assert checkpoints.latest() is None
    for step in (1, 2, 10):
        checkpoints.save(step, {"note": step}, _writer(str(step)))
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["step-00000002", "step-00000010"]
    folder, state = checkpoints.latest()
    assert state == {"step": 10, "note": 10}
    assert (folder / "part" / "weights").read_text() == "10"


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "no manifest"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, capsys, damage):
    checkpoints = Checkpoints(tmp_path, keep_last=3)
    for step in (1, 2):
        checkpoints.save(step, {}, _writer("some weights"))
    file = tmp_path / "step-00000002" / "part" / "weights"
    manifest = tmp_path / "step-00000002" / MANIFEST
    if damage == "flip":
        file.write_text("some weighty")
    elif damage == "truncate":
        file.write_text("some")
    elif damage == "remove":
        file.unlink()
    elif damage == "manifest":
        manifest.write_text("{")
    else:
        manifest.unlink()
    folder, state = checkpoints.latest()
    assert (folder.name, state["step"]) == ("step-00000001", 1)
    assert "step-00000002 does not match its manifest" in capsys.readouterr().out


def test_only_damaged_checkpoints_stop_the_run(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=3)
    checkpoints.save(1, {}, _writer("weights"))
    (tmp_path / "step-00000001" / "part" / "weights").write_text("other!!")
    with pytest.raises(SgpoError, match=r"no checkpoint in .* matches its manifest"):
        checkpoints.latest()


def test_a_full_disk_leaves_the_earlier_checkpoint_and_no_rubbish(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.save(1, {}, _writer("one"))
    with pytest.raises(SgpoError, match=r"step-00000002 could not be written \(.*No space left.*intact"):
        checkpoints.save(2, {}, _fail)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoints.latest()[1]["step"] == 1


def test_leftovers_of_a_kill_are_ignored_and_replaced(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    checkpoints.save(1, {}, _writer("one"))
    leftover = tmp_path / ".tmp-step-00000002"
    leftover.mkdir()
    (leftover / "junk").write_text("half written")
    assert checkpoints.latest()[1]["step"] == 1
    folder = checkpoints.save(2, {}, _writer("two"))
    assert not (folder / "junk").exists()
    assert not leftover.exists()


def test_write_folder_replaces_what_was_there(tmp_path):
    folder = tmp_path / "best"
    write_folder(folder, _writer("old"))
    write_folder(folder, _writer("new"))
    assert (folder / "part" / "weights").read_text() == "new"
    assert is_whole(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["best"]
    files = json.loads((folder / MANIFEST).read_text())["files"]
    assert list(files) == ["part/weights"]


def test_a_failed_replacement_keeps_the_old_folder(tmp_path):
    folder = tmp_path / "best"
    write_folder(folder, _writer("old"))
    with pytest.raises(SgpoError):
        write_folder(folder, _fail)
    assert (folder / "part" / "weights").read_text() == "old"
    assert is_whole(folder)
