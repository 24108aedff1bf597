import json

import pytest

from detr_jax.files import refuse_existing, remove_leftovers, replacing, write_json


def test_results_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder/result.json"
    write_json(path, {"AP": 0.5})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"AP": float("nan")})
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert json.loads(path.read_text()) == {"AP": 0.5}
    assert list(path.parent.iterdir()) == [path]


def test_finished_results_are_refused(tmp_path):
    path = tmp_path / "result.json"
    refuse_existing(path, overwrite=False)
    path.touch()
    refuse_existing(path, overwrite=True)
    with pytest.raises(FileExistsError, match=r"result\.json exists; .*--overwrite"):
        refuse_existing(path, overwrite=False)


def test_what_a_killed_process_began_to_write_is_removed(tmp_path):
    write_json(tmp_path / "result.json", {})
    with replacing(tmp_path / "result.json") as temporary:
        temporary.write_text("half")
        remove_leftovers(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
        temporary.write_text("{}")
