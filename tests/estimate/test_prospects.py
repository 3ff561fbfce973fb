"""What doctor says of GPUs follows from their properties."""

import pytest

from vimscale.estimate.calibration import NEAREST
from vimscale.estimate.prospects import COMPILED, Gpu, Prospect, expected, prospects
from vimscale.kernels import aot

H100 = Gpu("NVIDIA H100 80GB HBM3", "sm_90", 85_028_000_000)
A100 = Gpu("NVIDIA A100-SXM4-80GB", "sm_80", 85_174_000_000)
RTX = Gpu("NVIDIA GeForce RTX 4090", "sm_89", 25_386_000_000)
T4 = Gpu("Tesla T4", "sm_75", 15_642_000_000)


def _of(*gpus: Gpu, peers: bool = True) -> dict[str, Prospect]:
    return {one.what: one for one in prospects(gpus, peers)}


def test_targets_are_those_that_kernels_are_compiled_for_ahead_of_time() -> None:
    assert {*COMPILED} == {*aot.DEVICES}


def test_an_h100_gets_everything_and_calibrated_times() -> None:
    found = _of(H100, H100)
    assert all(one.good and not one.fix for one in found.values())
    assert "sm_90" in found["kernels"].found
    assert "bf16" in found["precision"].found
    assert "85 GB per rank" in found["rank memory"].found
    assert "calibrated: one H100" in found["images/s"].found


def test_expected_rates_fall_with_the_size_of_the_model_and_rise_with_graphs() -> None:
    found = expected(NEAREST, H100.memory)
    assert found["vim_tiny"][0] > found["vim_small"][0] > found["vim_base"][0] > 0
    assert all(replayed >= issued for replayed, issued in found.values())
    assert all(expected("a100", A100.memory)[name][0] < rates[0] for name, rates in found.items())


def test_a_device_that_nobody_measured_is_only_predicted() -> None:
    found = _of(A100)
    assert found["images/s"].found.partition("\n")[2].startswith("predicted, not calibrated")
    assert "no peers" in found["peer access"].found


def test_an_unknown_gpu_has_kernels_that_nobody_tested_and_no_prediction() -> None:
    found = _of(RTX, RTX, peers=False)
    assert not found["kernels"].good
    assert "pytest -m gpu" in found["kernels"].fix
    assert found["precision"].good
    assert "no prediction" in found["images/s"].found
    assert "through the host" in found["peer access"].found
    assert found["peer access"].fix


def test_an_old_gpu_is_told_to_train_elsewhere() -> None:
    found = _of(T4)
    assert "not sm_75" in found["kernels"].found
    assert "CUDA_VISIBLE_DEVICES" in found["kernels"].fix
    assert found["precision"].fix == "Set parallel.precision=fp32"


@pytest.mark.parametrize("pair", [(H100, A100), (RTX, H100)])
def test_different_gpus_have_no_common_prediction(pair: tuple[Gpu, Gpu]) -> None:
    assert "different kinds" in _of(*pair)["images/s"].found
