"""The cluster files that come with the package, ours and those of Ray's own launcher."""

import re
from pathlib import Path

import pytest
import yaml

from vimscale.errors import ClusterError
from vimscale.launch.cluster import load, shipped

RAY_UP = sorted((next(iter(shipped().values())).parent / "ray_up").glob("*.yaml"))


def _by_stem(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_cluster_file_is_whole_and_says_what_it_is_and_how_it_is_called(name: str) -> None:
    load(name)
    what, command, *_ = shipped()[name].read_text().splitlines()
    assert what.startswith("# ")
    assert re.match(rf"# vimscale submit .* --on {name}\b", command)


def test_numbers_with_a_colon_are_ranks_and_not_minutes() -> None:
    assert load("local", ["workers=1:4"]).workers == "1:4"
    assert load("kuberay_h100", ["workers=10:32"]).least_nodes == 2
    with pytest.raises(ClusterError, match="'0:4' is neither a number of ranks nor MIN:MAX"):
        load("local", ["workers=0:4"])


@pytest.mark.parametrize("path", RAY_UP, ids=_by_stem)
def test_what_ray_up_reads_is_valid_for_it(path: Path) -> None:
    from ray.autoscaler._private.util import fillout_defaults, validate_config

    validate_config(fillout_defaults(yaml.safe_load(path.read_text())))


@pytest.mark.parametrize("path", RAY_UP, ids=_by_stem)
def test_ray_up_files_and_ours_mean_the_same_cluster_with_its_dashboard_on_loopback(path: Path) -> None:
    theirs, ours = yaml.safe_load(path.read_text()), load(f"ray_{path.stem}")
    worker = theirs["available_node_types"]["worker"]
    assert (ours.nodes, ours.gpus, ours.cpus) == (
        worker["max_workers"],
        worker["resources"]["GPU"],
        worker["resources"]["CPU"],
    )
    (head,) = [line for line in theirs["head_start_ray_commands"] if "--head" in line]
    assert "--dashboard-host=127.0.0.1" in head
    assert any("RAY_AUTH_MODE=token" in line for line in theirs["setup_commands"])
