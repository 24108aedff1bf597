import numpy as np
import pytest
from tiny import TINY_CONFIG, tiny_detector

import detr_jax
from detr_jax.models.detr.relabel import with_labels
from detr_jax.models.parameters import named_parameters


def test_a_new_head_keeps_no_object_and_classes_of_the_same_name():
    model = tiny_detector()
    with pytest.warns(UserWarning, match="it keeps no object, Dog and is new, to be trained, for fox, owl"):
        other = with_labels(model, ["fox", "Dog", "owl"])
    assert other.labels == ("fox", "Dog", "owl") and model.labels == TINY_CONFIG.labels
    before, after = named_parameters(model), named_parameters(other)
    assert before.keys() == after.keys()
    for name in before:
        if name not in ("class_head.kernel", "class_head.bias"):
            np.testing.assert_array_equal(before[name], after[name], err_msg=name)
    for name in ("class_head.kernel", "class_head.bias"):
        np.testing.assert_array_equal(after[name][..., [1, 3]], before[name][..., [2, 3]])
        new = np.asarray(after[name][..., [0, 2]])
        assert np.abs(new).min() > 0 and np.abs(new).max() <= 1 / np.sqrt(16), "torch.nn.Linear's first values"


def test_a_new_head_is_the_same_every_time():
    model = tiny_detector()
    with pytest.warns(UserWarning, match="class head"):
        one, again, other = (with_labels(model, ["fox", "owl"], seed) for seed in (0, 0, 1))
    assert detr_jax.fingerprint(one) == detr_jax.fingerprint(again) != detr_jax.fingerprint(other)


def test_a_detector_is_loaded_with_other_classes_and_saved_with_them(tmp_path):
    detr_jax.save(tiny_detector(), tmp_path / "old.safetensors")
    with pytest.warns(UserWarning, match="it keeps no object, dog and is new, to be trained, for fox"):
        model = detr_jax.load(tmp_path / "old.safetensors", labels=["dog", "fox"])
    detr_jax.save(model, tmp_path / "new.safetensors")
    loaded = detr_jax.load(tmp_path / "new.safetensors")
    assert loaded.labels == ("dog", "fox")
    assert detr_jax.fingerprint(loaded) == detr_jax.fingerprint(model)


@pytest.mark.filterwarnings("error")
def test_its_own_classes_change_nothing():
    model = tiny_detector()
    assert with_labels(model, model.labels) is model


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], r"at least one class name, none of them empty, not \[\]"),
        (["cat", " "], r"none of them empty, not \['cat', ' '\]"),
        ("cat", "must be a list of at least one class name, .* not 'cat'"),
        (["cat", "dog", "Cat"], "labels must differ whatever their case, but there are cat, Cat"),
    ],
)
def test_labels_that_are_none_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        with_labels(tiny_detector(), labels)
