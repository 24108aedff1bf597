import jax

from detr_jax.training.detector.log import TrainingLog, plot_log, read_log


def test_log_goes_on_where_the_checkpoint_was(tmp_path):
    path = tmp_path / "log.jsonl"
    log = TrainingLog(path, steps=10, interval=2)
    written = [log.record(step, {"detection": step, "dense": jax.numpy.float32(1)}) for step in range(7)]
    assert [entry and entry["detection"] for entry in written] == [None, 0.5, None, 2.5, None, 4.5, None]
    with path.open("a") as file:
        file.write('{"step": 8, "det')  # killed while writing

    resumed = TrainingLog(path, steps=9, interval=2)
    for step in range(4, 9):
        resumed.record(step, {"detection": 100, "dense": 1})
    entries = read_log(path)
    assert [(entry["step"], entry["detection"]) for entry in entries] == [
        (2, 0.5),
        (4, 2.5),
        (6, 100),
        (8, 100),
        (9, 100),
    ]
    minutes = [entry["minutes"] for entry in entries]
    assert minutes == sorted(minutes)


def test_figure_of_an_empty_log(tmp_path):
    assert read_log(tmp_path / "log.jsonl") == []
    plot_log([], tmp_path / "training.png")
    assert [file.name for file in tmp_path.iterdir()] == ["training.png"]
