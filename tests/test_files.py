import json

import pytest

from detr_jax.files import refuse_existing, replacing, write_json


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
