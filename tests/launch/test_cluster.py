"""Cluster files: what is read, and what is said of faults; and those of Ray's own launcher."""

from pathlib import Path

import pytest
import yaml

from vimscale.errors import ClusterError
from vimscale.launch import cluster

RAY_UP = sorted((cluster.shipped()["ray_aws"].parent / "ray_up").glob("*.yaml"))


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
    gpu, image, claim, secret, runs, token = _faults(path)
    assert gpu.startswith("gpu: say which the 8 GPUs of a node are")
    assert image.startswith("image: kuberay needs the image")
    assert claim.startswith("kuberay.claim: name the PersistentVolumeClaim")
    assert secret.startswith("kuberay.secret: name the Kubernetes secret that holds TOKEN")
    assert runs.startswith("runs 'runs': give the full path")
    assert token.startswith("TOKEN: stands in environment and in secrets")


def test_the_mirror_is_read_by_its_earlier_name_but_not_by_both(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("base: ray\nsecond: s3://b/runs\n")
    assert cluster.load(path).mirror == "s3://b/runs"
    assert cluster.load(path, ["mirror=s3://c"]).mirror == "s3://c"
    path.write_text("base: ray\nsecond: s3://b/runs\nmirror: s3://c\n")
    assert _faults(path) == ["second: this is the earlier name of mirror, which is given too; remove second"]


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


def test_numbers_with_a_colon_are_ranks_and_not_minutes() -> None:
    assert cluster.load("local", ["workers=1:4"]).workers == "1:4"
    assert cluster.load("kuberay_h100", ["workers=10:32"]).least_nodes == 2
    with pytest.raises(ClusterError, match="'0:4' is neither a number of ranks nor MIN:MAX"):
        cluster.load("local", ["workers=0:4"])


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.stem)
def test_what_ray_up_reads_is_valid_for_it(path: Path) -> None:
    from ray.autoscaler._private.util import fillout_defaults, validate_config

    validate_config(fillout_defaults(yaml.safe_load(path.read_text())))


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.stem)
def test_ray_up_files_and_ours_mean_the_same_cluster_with_its_dashboard_on_loopback(path: Path) -> None:
    theirs, ours = yaml.safe_load(path.read_text()), cluster.load(f"ray_{path.stem}")
    worker = theirs["available_node_types"]["worker"]
    assert (ours.nodes, ours.gpus, ours.cpus) == (
        worker["max_workers"],
        worker["resources"]["GPU"],
        worker["resources"]["CPU"],
    )
    (head,) = [line for line in theirs["head_start_ray_commands"] if "--head" in line]
    assert "--dashboard-host=127.0.0.1" in head
    assert any("RAY_AUTH_MODE=token" in line for line in theirs["setup_commands"])
