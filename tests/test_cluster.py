"""Cluster files: what is read, and what is said of faults."""

from pathlib import Path

import pytest

from vimscale.errors import ClusterError
from vimscale.launch import cluster


def _faults(source: str | Path, *overrides: str) -> list[str]:
    with pytest.raises(ClusterError) as caught:
        cluster.load(source, overrides)
    return caught.value.faults


@pytest.mark.parametrize("name", cluster.shipped())
def test_every_shipped_cluster_loads_and_opens_with_what_it_is(name: str) -> None:
    assert cluster.load(name).backend
    text = cluster.shipped()[name].read_text()
    assert text.startswith("# ")
    assert f"--on {name}" in text


def test_all_faults_are_reported_at_once_each_with_a_way_out() -> None:
    wrong = ("gpu=h10", "gpus=8", "secrets=[TOKEN, 1b]", "time_limit=3h30", "workers=4:x", "bakend=3", "interface=a b")
    text = "\n".join(_faults("local", *wrong))
    assert "gpu: 'h10' is no GPU whose figures are known; did you mean h100?" in text
    assert "secrets[1]: '1b' cannot name an environment variable" in text
    assert "time_limit: '3h30' is not a time; write 45m, 12h or 7d" in text
    assert "workers: '4:x' is neither a number of ranks nor MIN:MAX" in text
    assert "bakend: no such key; did you mean backend?" in text
    assert "interface: 'a b' is not one word" in text


def test_what_does_not_fit_together_is_said(tmp_path: Path) -> None:
    assert _faults("local", "nodes=2", "kuberay.context=here") == [
        "kuberay: the backend is local; leave this section out",
        "nodes 2: backend local has 1",
    ]
    path = tmp_path / "mine.yaml"
    path.write_text("backend: kuberay\ngpus: 8\nenvironment: {TOKEN: abc}\nsecrets: [TOKEN]\n")
    gpu, image, runs, token = _faults(path)
    assert gpu.startswith("gpu: say which the 8 GPUs of a node are")
    assert image.startswith("image: kuberay needs the image")
    assert runs.startswith("runs 'runs': give the full path")
    assert token.startswith("TOKEN: stands in environment and in secrets")


def test_a_cluster_file_may_build_on_another(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("base: ray\ncpus: 64\nray: {address: 'http://10.0.0.1:8265'}\n")
    loaded = cluster.load(path, ["nodes=4", "workers=2"])
    assert (loaded.backend, loaded.cpus, loaded.nodes, loaded.workers) == ("ray", 64, 4, "2")
    assert loaded.ray is not None
    assert loaded.ray.address == "http://10.0.0.1:8265"


@pytest.mark.parametrize("name", ["a b", "$(reboot)", "--wrap=reboot", "a\nb", "x;y"])
def test_words_of_commands_are_words(name: str) -> None:
    text = "\n".join(_faults("local", f'image="{name}"'.replace("\n", "\\n")))
    assert "is not one word" in text
