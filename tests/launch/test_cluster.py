"""Cluster files: what they may say, how faults are reported, and the files for `ray up`."""

from pathlib import Path

import pytest
import yaml

from vimscale.errors import ClusterError
from vimscale.launch import cluster, hardware
from vimscale.launch.commands import plan
from vimscale.launch.jobs.backend import launch_arguments
from vimscale.recipe import recipe

RAY_UP = sorted((cluster.shipped()["ray_aws"].parent / "ray_up").glob("*.yaml"))


def _faults(source: str | Path, *overrides: str) -> list[str]:
    with pytest.raises(ClusterError) as caught:
        cluster.load(source, overrides)
    return caught.value.faults


@pytest.mark.parametrize("name", cluster.shipped())
def test_every_shipped_cluster_loads_and_starts_with_a_description(name: str) -> None:
    assert cluster.load(name).backend
    text = cluster.shipped()[name].read_text()
    assert text.startswith("# ")
    assert f"--on {name}" in text


def test_all_faults_are_reported_at_once_each_with_a_fix() -> None:
    wrong = ("gpu=h10", "gpus=8", "secrets=[TOKEN, 1b]", "time_limit=3h30", "workers=4:x", "bakend=3", "interface=a b")
    text = "\n".join(_faults("local", *wrong))
    assert "gpu: 'h10' is not a known GPU; did you mean h100?" in text
    assert "secrets[1]: '1b' cannot name an environment variable" in text
    assert "time_limit: '3h30' is not a time; write 45m, 12h or 7d" in text
    assert "workers: '4:x' is neither a number of ranks nor MIN:MAX" in text
    assert "bakend: no such key; did you mean backend?" in text
    assert "interface: 'a b' is not one word" in text


def test_settings_that_contradict_each_other_are_reported(tmp_path: Path) -> None:
    assert _faults("local", "nodes=2", "kuberay.context=here") == [
        "kuberay: the backend is local; leave this section out",
        "nodes 2: backend local has 1",
    ]
    path = tmp_path / "mine.yaml"
    path.write_text("backend: kuberay\ngpus: 8\nenvironment: {TOKEN: abc}\nsecrets: [TOKEN]\n")
    gpu, image, claim, secret, runs, token = _faults(path)
    assert gpu.startswith("gpu: give the model of a node's 8 GPUs")
    assert image.startswith("image: kuberay needs the image")
    assert claim.startswith("kuberay.claim: name the PersistentVolumeClaim")
    assert secret.startswith("kuberay.secret: name the Kubernetes secret that holds TOKEN")
    assert runs.startswith("runs 'runs': give the full path")
    assert token.startswith("TOKEN: is in environment and in secrets")


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
def test_values_for_commands_must_be_single_words(name: str) -> None:
    text = "\n".join(_faults("local", f'image="{name}"'.replace("\n", "\\n")))
    assert "is not one word" in text


def test_two_numbers_with_a_colon_are_a_range_of_ranks() -> None:
    assert cluster.load("local", ["workers=1:4"]).workers == "1:4"
    assert cluster.load("kuberay_h100", ["workers=10:32"]).least_nodes == 2
    with pytest.raises(ClusterError, match="'0:4' is neither a number of ranks nor MIN:MAX"):
        cluster.load("local", ["workers=0:4"])


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.stem)
def test_ray_accepts_the_ray_up_files(path: Path) -> None:
    from ray.autoscaler._private.util import fillout_defaults, validate_config

    validate_config(fillout_defaults(yaml.safe_load(path.read_text())))


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.stem)
def test_ray_up_files_match_our_cluster_files_and_keep_the_dashboard_on_loopback(path: Path) -> None:
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


@pytest.mark.parametrize(
    ("name", "changes", "ranks"),
    [
        ("local", ["cpus=1"], "1"),
        ("local", ["workers=1:4", "cpus=1"], "1:4"),
        ("local", ["cpus=1", "memory=4"], "1"),
        ("ray", ["cpus=1"], "1"),
        ("ray", ["cpus=64"], "2"),
        ("ray", ["nodes=4"], "4"),
        ("ray", ["nodes=2", "gpus=8", "gpu=h100"], "16"),
    ],
)
def test_a_plan_counts_the_ranks_that_a_job_gets(
    name: str, changes: list[str], ranks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "gpus", lambda: 0)
    chosen = cluster.load(name, changes)
    assert chosen.ranks == ranks
    assert launch_arguments(chosen, "recipe.yaml", "runs")[-2:] == ["--workers", ranks]
    most = int(ranks.rpartition(":")[2])
    assert chosen.most_ranks == most
    planner, _ = plan.prepare(recipe.load("vim_digits_cpu"), chosen, most)
    assert planner.outlook(most).world == most


@pytest.mark.parametrize(("cpus", "gpus", "ranks"), [(1, 0, "1"), (32, 0, "2"), (32, 4, "4")])
def test_this_machine_has_as_many_ranks_as_its_hardware_allows_unless_the_file_says_otherwise(
    cpus: int, gpus: int, ranks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "cpus", lambda: cpus)
    monkeypatch.setattr(hardware, "gpus", lambda: gpus)
    assert cluster.load("local").ranks == ranks
    assert cluster.load("local", ["gpus=2", "gpu=h100"]).ranks == "2"
    assert cluster.load("local", ["memory=4"]).ranks == "2", "a file that gives memory describes the hardware by itself"
