"""Tuning without a GPU: what is timed, kept, read again and left alone. The times are made up."""

import json

import pytest
import torch

from maskalign_kernels import runtime, tuning

pytestmark = pytest.mark.skipif(runtime.INTERPRET, reason="nothing is tuned in the interpreter")
CONFIGS = [{"ROWS": 4}, {"ROWS": 8}, {"ROWS": 16}, {"ROWS": 32}]
TIMES = {4: 3.0, 8: 2.0, 16: 1.0, 32: None}  # The last one does not fit the device.


@pytest.fixture
def choose(monkeypatch, tmp_path):
    """choose(mode) -> (configuration, the ones that were timed), on a pretended GPU with a cache file in tmp_path."""
    triton = tuning.triton
    monkeypatch.setattr(triton.testing, "do_bench", lambda run, **_: run())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "pretended")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("MASKALIGN_KERNELS_CACHE", str(tmp_path / "sub" / "choices.json"))

    def call(mode, tensor=None, key=(8, torch.float16)):
        timed = []

        def launch(config):
            timed.append(config["ROWS"])
            if TIMES[config["ROWS"]] is None:
                raise triton.runtime.errors.OutOfResources(300, 200, "shared memory")
            return TIMES[config["ROWS"]]

        monkeypatch.setenv("MASKALIGN_KERNELS_AUTOTUNE", mode)
        tensor = torch.zeros(1) if tensor is None else tensor
        return tuning.choose("mix", key, CONFIGS, tensor, launch)["ROWS"], timed

    yield call
    tuning.forget()


def test_off_takes_the_first_and_times_nothing(choose, tmp_path):
    assert choose("0") == (4, [])
    assert not (tmp_path / "sub").exists()


def test_the_fastest_is_kept_per_shape(choose, tmp_path):
    assert choose("1") == (16, [4, 8, 16, 32])
    assert choose("1") == (16, []), "measured once"
    tuning.forget()  # Another process.
    assert choose("cached") == (16, []), "read from the file"
    assert choose("1", key=(9, torch.float16)) == (16, [4, 8, 16, 32]), "another shape is measured"
    (first, second) = json.loads((tmp_path / "sub" / "choices.json").read_text())
    assert "pretended" in first and "mix|8|torch.float16" in first + second


def test_cached_never_times(choose):
    assert choose("cached") == (4, [])


def test_nothing_is_timed_without_data(choose):
    assert choose("1", tensor=torch.zeros(1, device="meta")) == (4, [])


@pytest.mark.parametrize("text", ["not JSON", "[1, 2]", '{"pretended": {"ROWS": 5}}'])
def test_a_damaged_cache_counts_as_empty(text, choose, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "choices.json").write_text(text)
    assert choose("1") == (16, [4, 8, 16, 32])


def test_a_choice_that_is_no_longer_listed_is_measured_again(choose, tmp_path):
    choose("1")
    path = tmp_path / "sub" / "choices.json"
    path.write_text(path.read_text().replace("16", "64"))
    tuning.forget()
    assert choose("cached") == (4, [])
    assert choose("1") == (16, [4, 8, 16, 32])
