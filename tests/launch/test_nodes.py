"""One run on several nodes, as real as one machine allows: if possible, nodes with their own addresses."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support import nodes
from tests.support.shell import Shell, relative_difference

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@contextmanager
def _two_nodes(kind: str, shell: Shell) -> Iterator[tuple[str, list[str]]]:
    """Provide the address of two nodes, and the words before a command that run it on the head."""
    if kind == "one address":
        with nodes.one_address() as cluster:
            cluster.add_node(num_cpus=1)
            yield cluster.address, []
    else:
        _skip_without_namespaces()
        with nodes.own_addresses(2, shell.env) as own:
            yield own.address, own.inside(0)


def _skip_without_namespaces() -> None:
    if (why := nodes.why_not()) is not None:
        pytest.skip(why)


@pytest.mark.parametrize("kind", ["one address", "own addresses"])
def test_two_nodes_compute_the_same_bits_as_one(shell: Shell, kind: str) -> None:
    with _two_nodes(kind, shell) as (address, inside):
        for stage in (("parallel.zero=2",), ("parallel.zero=3", "parallel.persist=0")):
            shell.run("launch", "small.yaml", "name=one", *stage, "--no-ray", "--workers", "2")
            on_ray = ("launch", "small.yaml", "name=two", *stage, "--address", address, "--workers", "2")
            output = shell.finish(shell.popen(*on_ray, inside=inside))
            assert "two: 2 ranks on the Ray at" in output
            assert shell.losses("two") == shell.losses("one"), stage
            for name in ("one", "two"):
                (shell.folder / "runs" / name).rename(shell.folder / f"runs/{name}-{stage[0]}")


def test_a_run_survives_a_cut_link_and_takes_the_node_back(shell: Shell) -> None:
    _skip_without_namespaces()
    options = ("steps=600", "checkpoint.every=20", "checkpoint.keep=100", "log.every=10")
    shell.run("launch", "small.yaml", "name=calm", *options, "--no-ray", "--workers", "2")
    shell.env.update(nodes.QUICK_DEATHS)
    with nodes.own_addresses(2, shell.env) as own:
        on_ray = ("launch", "small.yaml", *options, "--address", own.address, "--workers", "1:2")
        process = shell.popen(*on_ray, inside=own.inside(0))
        shell.reaches(process, "small", 50)
        own.cut(1)
        shell.reaches(process, "small", 80)
        own.reconnect(1)
        own.start(1)
        output = shell.finish(process)
    assert "small: 2 ranks on the Ray" in output
    assert re.search(r"rank \d: process \d+ died with its node; restarting", output)
    assert "there is room for 2 ranks now" in output
    assert shell.world_sizes("small") == [2, 1, 2]
    # with one rank, sums are in another order
    assert relative_difference(shell.losses("small"), shell.losses("calm")) < 1e-5
