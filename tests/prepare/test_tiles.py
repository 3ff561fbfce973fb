"""Large images become bags of tiles: every pixel where it was, background left out, in bounded memory."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image
from typer.testing import CliRunner

from launch.commands.app import app
from tests.support import later
from tests.support.image_sets import files_of, samples_of
from tests.support.slides import PAPER, scene, write_pyramid
from vimscale.data.images import bags, cutting, decode
from vimscale.data.images.cutting import Tiling
from vimscale.data.shards.manifest import Bags
from vimscale.errors import DataError
from vimscale.prepare import adopt, large, merge
from vimscale.prepare.inputs.rows import Columns
from vimscale.prepare.inspection import contact_sheet, inspect, repair
from vimscale.prepare.make import finished, prepare
from vimscale.prepare.shapes import Options

tifffile = later.module("tifffile")

CELLS = [(0, 1), (2, 0), (2, 4)]
SIDE = 64
PNG = Tiling(SIDE, format="png")


def _prepared(tmp_path: Path, tiling: Tiling = PNG, **options: Any) -> dict[str, dict]:
    prepare(str(tmp_path / "in"), tmp_path / "set", Options(tiles=tiling, **options), Columns())
    return samples_of(tmp_path / "set")


def _tiles(sample: dict) -> dict[tuple[int, int], np.ndarray]:
    found = bags.stored(sample, "here", None)
    images = bags.images(sample, found, "here")
    return {tuple(at): image.permute(1, 2, 0).numpy() for at, image in zip(found.at.tolist(), images, strict=True)}


def _save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def test_an_image_becomes_its_tiles_and_their_corners(tmp_path: Path) -> None:
    pixels = scene(200, 330, SIDE, CELLS)
    _save(tmp_path / "in" / "tumour" / "slide.1.png", pixels)
    _save(tmp_path / "in" / "normal" / "plain.png", scene(130, 64, SIDE, [(1, 0)]))
    samples = _prepared(tmp_path)
    sample = samples["tumour/slide_1"]
    about = json.loads(sample["tiles.json"])
    assert about == {
        "size": [200, 330],
        "side": SIDE,
        "level": 0,
        "downsample": 1.0,
        "background": 4 * 6 - 3,
        "at": [[0, 64], [128, 0], [128, 256]],
    }
    assert sample["cls"] == b"1"
    tiles = _tiles(sample)
    assert list(tiles) == [(0, 64), (128, 0), (128, 256)]
    for (row, column), tile in tiles.items():
        assert np.array_equal(tile, pixels[row : row + SIDE, column : column + SIDE])
    manifest = inspect.locate(str(tmp_path / "set")).manifest
    assert manifest.tiles == Bags(side=SIDE, least=1, most=3, total=4)
    assert manifest.labels == (1, 1)
    names = [s["__key__"] for s in webdataset.WebDataset(str(tmp_path / "set/00000.tar"), shardshuffle=False)]
    assert sorted(names) == sorted(samples), "plain webdataset finds the same samples"
    with tarfile.open(tmp_path / "set/00000.tar") as tar:
        assert "tumour/slide_1.r000128c000256.png" in tar.getnames()


def test_rims_are_padded_with_the_colour_of_the_edge(tmp_path: Path) -> None:
    pixels = scene(100, 90, SIDE, [(1, 1)])
    _save(tmp_path / "in" / "a" / "x.png", pixels)
    ((at, tile),) = _tiles(_prepared(tmp_path)["a/x"]).items()
    assert at == (64, 64)
    inside = pixels[64:, 64:]
    assert np.array_equal(tile, np.pad(inside, ((0, 28), (0, 38), (0, 0)), mode="edge"))


def test_mean_and_std_are_those_of_the_kept_pixels_without_padding(tmp_path: Path) -> None:
    pixels = scene(100, 90, SIDE, [(0, 0), (1, 1)])
    _save(tmp_path / "in" / "a" / "x.png", pixels)
    manifest = prepare(str(tmp_path / "in"), tmp_path / "set", Options(tiles=PNG), Columns())[""]
    kept = np.concatenate([pixels[:64, :64].reshape(-1, 3), pixels[64:, 64:].reshape(-1, 3)]) / 255
    assert np.allclose(manifest.mean, kept.mean(axis=0), atol=6e-5)
    assert np.allclose(manifest.std, kept.std(axis=0), atol=6e-5)


# ---- pyramids


@pytest.mark.parametrize("big", [False, True], ids=["tiff", "bigtiff"])
@pytest.mark.parametrize("compression", [None, "zlib", "lzw"])
def test_any_level_of_a_pyramid_is_cut(tmp_path: Path, big: bool, compression: str | None) -> None:
    pixels = scene(300, 410, SIDE, [(0, 0), (1, 2), (4, 6)])
    write_pyramid(tmp_path / "in" / "a" / "x.tif", pixels, big=big, compression=compression)
    for level, downsample in ((0, None), (1, None), (None, 2.05), (2, None)):
        tiling = Tiling(SIDE, level, downsample, background=0, format="png")
        options = Options(tiles=tiling)
        folder = tmp_path / f"set-{level}-{downsample}"
        prepare(str(tmp_path / "in"), folder, options, Columns())
        sample = samples_of(folder)["a/x"]
        shrunk = 2 ** (1 if downsample else level or 0)
        expected = pixels[::shrunk, ::shrunk]
        about = json.loads(sample["tiles.json"])
        assert about["size"] == list(expected.shape[:2])
        assert (about["level"], round(about["downsample"])) == (1 if downsample else level, shrunk)
        tiles = _tiles(sample)
        assert len(tiles) == -(-expected.shape[0] // SIDE) * -(-expected.shape[1] // SIDE)
        for (row, column), tile in tiles.items():
            part = expected[row : row + SIDE, column : column + SIDE]
            assert np.array_equal(tile[: part.shape[0], : part.shape[1]], part)


def test_a_level_that_is_not_there_is_listed_with_those_that_are(tmp_path: Path) -> None:
    write_pyramid(tmp_path / "in" / "a" / "x.tif", scene(256, 256, SIDE, CELLS))
    _save(tmp_path / "in" / "b" / "y.png", scene(256, 256, SIDE, CELLS))
    expected = r"2 x level\): .*x.tif, sample a/x: it has no downsample 16; its levels are 0 \(downs"
    with pytest.raises(DataError, match=expected):
        _prepared(tmp_path, Tiling(SIDE, downsample=16), shuffle=False)


FORMS: dict[str, dict[str, Any]] = {
    "jpeg tiles": {"tile": (64, 64), "compression": "jpeg", "compressionargs": {"level": 95}},
    "tiles unlike ours": {"tile": (48, 80), "compression": "zlib", "predictor": True},
    "strips": {"tile": None, "rowsperstrip": 24},
    "one strip": {"tile": None, "rowsperstrip": 256, "compression": "zstd"},
    "planes": {"tile": (64, 64), "planarconfig": "separate"},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_way_to_store_a_tiff_gives_the_same_pixels(tmp_path: Path, form: str) -> None:
    pixels = scene(200, 330, 200, [(0, 0), (0, 1)])
    smooth = np.asarray(Image.fromarray(pixels[::50, ::50]).resize((330, 200), Image.Resampling.BICUBIC))
    (tmp_path / "in" / "a").mkdir(parents=True)
    options = {"photometric": "rgb", **FORMS[form]}
    data = np.moveaxis(smooth, -1, 0) if options.get("planarconfig") else smooth
    tifffile.imwrite(tmp_path / "in" / "a" / "x.svs", data, **options)
    tiles = _tiles(_prepared(tmp_path, Tiling(SIDE, background=0, format="png"))["a/x"])
    assert len(tiles) == 24
    most = 3 if form == "jpeg tiles" else 0
    for (row, column), tile in tiles.items():
        part = smooth[row : row + SIDE, column : column + SIDE].astype(int)
        assert np.abs(tile[: part.shape[0], : part.shape[1]] - part).mean() <= most


def _grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=-1)


RAMP = np.arange(64 * 64).reshape(64, 64) // 16
ALPHA = np.dstack([np.zeros((64, 64, 3), np.uint8), RAMP.astype(np.uint8)])
PIXELS: dict[str, tuple[np.ndarray, dict[str, Any], np.ndarray]] = {
    "grey": (RAMP.astype(np.uint8), {"photometric": "minisblack"}, _grey(RAMP)),
    "white is zero": (RAMP.astype(np.uint8), {"photometric": "miniswhite"}, _grey(255 - RAMP)),
    "16 bits": ((RAMP * 257).astype(np.uint16), {"photometric": "minisblack"}, _grey(RAMP)),
    "floats": ((RAMP / 255).astype(np.float32), {"photometric": "minisblack"}, _grey(RAMP)),
    "transparent": (ALPHA, {"photometric": "rgb", "extrasamples": ["unassalpha"]}, _grey(255 - RAMP)),
    "more channels": (ALPHA, {"photometric": "rgb", "extrasamples": ["unspecified"]}, np.zeros((64, 64, 3))),
    "palette": (
        RAMP.astype(np.uint8),
        {"photometric": "palette", "colormap": np.stack([np.arange(256) * 256] * 3).astype(np.uint16)},
        _grey(RAMP),
    ),
}


@pytest.mark.parametrize("kind", PIXELS)
def test_pixels_of_every_kind_become_8_bit_colours(tmp_path: Path, kind: str) -> None:
    data, options, expected = PIXELS[kind]
    (tmp_path / "in" / "a").mkdir(parents=True)
    tifffile.imwrite(tmp_path / "in" / "a" / "x.tif", data, tile=(16, 32), **options)
    (tile,) = _tiles(_prepared(tmp_path, Tiling(SIDE, background=0, format="png"))["a/x"]).values()
    assert np.array_equal(tile, expected)


@pytest.mark.parametrize(
    ("data", "options", "why"),
    [
        (RAMP.astype(np.int16), {}, "signed whole numbers of 16 bits"),
        (RAMP.astype(np.float32), {}, "floats from 0 to 255"),
        (np.zeros((5, 64, 64), np.uint8), {}, "its axes are .YX"),
        (np.zeros((64, 64, 4), np.uint8), {"photometric": "separated"}, "grey, RGB, palette and YCbCr are read"),
    ],
)
def test_pixels_of_unknown_meaning_are_skipped(tmp_path: Path, data: np.ndarray, options: dict, why: str) -> None:
    (tmp_path / "in" / "a").mkdir(parents=True)
    tifffile.imwrite(tmp_path / "in" / "a" / "x.tif", data, **({"photometric": "minisblack"} | options))
    with pytest.raises(DataError, match=rf"none of the 1 inputs is usable \(1 x image\).*{why}"):
        _prepared(tmp_path)


# ---- background


def _with_specks(count: int) -> np.ndarray:
    pixels = np.full((64, 64, 3), PAPER, np.uint8)
    pixels.reshape(-1, 3)[:count] = 0
    return pixels


@pytest.mark.parametrize(
    ("pixels", "tolerance", "left_out"),
    [
        (_with_specks(0), 10, True),
        (np.zeros((64, 64, 3), np.uint8), 10, True),
        (_with_specks(4), 10, True),
        (_with_specks(5), 10, False),
        (_with_specks(0), 0, False),
        (PAPER - RAMP[..., None].repeat(3, -1) % 11, 10, True),
        (PAPER - RAMP[..., None].repeat(3, -1) % 32, 10, False),
        (PAPER - RAMP[..., None].repeat(3, -1) % 32, 20, True),
    ],
    ids=["paper", "black", "specks", "too many", "all", "grain", "coarse grain", "tolerant"],
)
def test_background_is_one_colour_but_for_specks(pixels: np.ndarray, tolerance: int, left_out: bool) -> None:
    pixels = pixels.astype(np.uint8)
    counts = np.stack([np.bincount(pixels[..., c].reshape(-1), minlength=256) for c in range(3)])
    assert cutting.is_background(counts, tolerance) is left_out


def test_an_image_without_anything_but_background_is_skipped(tmp_path: Path) -> None:
    _save(tmp_path / "in" / "a" / "x.png", scene(128, 128, SIDE, []))
    _save(tmp_path / "in" / "a" / "y.png", scene(128, 128, SIDE, [(0, 1)]))
    assert _prepared(tmp_path).keys() == {"a/y"}
    (skipped,) = map(json.loads, (tmp_path / "set/skipped.jsonl").read_text().splitlines())
    assert skipped["cause"] == "background"
    assert "each of its 4 tiles is background; lower --background" in skipped["message"]


# ---- inputs and commands


def test_images_in_tars_and_tables_are_cut_too(tmp_path: Path) -> None:
    pixels = scene(128, 128, SIDE, [(0, 0), (1, 1)])
    write_pyramid(tmp_path / "x.tif", pixels, 1)
    (tmp_path / "t.csv").write_text("path,label\nx.tif,odd\n")
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name, data in (("x.cls", b"0"), ("x.tif", (tmp_path / "x.tif").read_bytes()), ("x.txt", b"note")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    found = []
    for source in ("t.csv", "t.tar"):
        prepare(str(tmp_path / source), tmp_path / f"{source}.set", Options(tiles=PNG), Columns())
        found.append(samples_of(tmp_path / f"{source}.set")["x"])
    assert {name: found[0][name] for name in bags_of(found[0])} == {name: found[1][name] for name in bags_of(found[1])}
    assert found[1]["txt"] == b"note"
    with pytest.raises(DataError, match="it is a bag of tiles already; `vimscale data index` and `merge` take such"):
        prepare(str(tmp_path / "t.csv.set"), tmp_path / "again", Options(tiles=PNG), Columns())


def bags_of(sample: dict) -> list[str]:
    return [name for name in sample if name == bags.MEMBER or name.startswith("r0")]


def test_damaged_files_are_skipped_and_named(tmp_path: Path) -> None:
    folder = tmp_path / "in" / "a"
    write_pyramid(folder / "good.tif", scene(256, 256, SIDE, CELLS), 1, compression="zlib")
    data = (folder / "good.tif").read_bytes()
    (folder / "cut.tif").write_bytes(data[: len(data) // 2])
    (folder / "junk.tif").write_bytes(b"II*\0" + bytes(100))
    (folder / "text.png").write_bytes(b"not an image")
    (folder / "empty.png").write_bytes(b"")
    _save(folder / "half.png", scene(256, 256, SIDE, CELLS))
    (folder / "half.png").write_bytes((folder / "half.png").read_bytes()[:9000])
    assert _prepared(tmp_path).keys() == {"a/good"}
    skipped = [json.loads(line) for line in (tmp_path / "set/skipped.jsonl").read_text().splitlines()]
    assert {(row["key"], row["cause"]) for row in skipped} == {
        (f"a/{name}", "image") for name in ("cut", "junk", "text", "empty", "half")
    }
    assert all(f"sample {row['key']}: " in row["message"] for row in skipped)


def test_an_image_beyond_pillows_limit_is_cut_on_purpose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = scene(1024, 1024, SIDE, [(3, 3)])
    _save(tmp_path / "in" / "a" / "x.png", pixels)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    monkeypatch.setattr(decode, "MAX_PIXELS", 10_000)
    assert list(_tiles(_prepared(tmp_path)["a/x"])) == [(192, 192)]
    assert Image.MAX_IMAGE_PIXELS == 10_000, "the limit is back afterwards"
    monkeypatch.setattr(large, "MOST_AT_ONCE", 1_000_000)
    with pytest.raises(DataError, match=r"1 x pixels.*1,024 x 1,024 pixels; a PNG is decoded at once, and at most 1,0"):
        prepare(str(tmp_path / "in"), tmp_path / "other", Options(tiles=PNG), Columns())


def test_without_tifffile_the_command_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pyramid(tmp_path / "in" / "a" / "x.tif", scene(64, 64, SIDE, [(0, 0)]), 1)
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(DataError, match=r"--tiles of TIFF files needs tifffile: pip install 'vimscale\[tiles\]'"):
        prepare(str(tmp_path / "in"), tmp_path / "set", Options(tiles=PNG), Columns())
    assert not list(tmp_path.glob("set*"))


def test_a_sample_may_not_outgrow_what_training_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(tmp_path / "in" / "a" / "x.png", scene(256, 256, SIDE, CELLS))
    monkeypatch.setattr(cutting, "MEMBER_LIMIT", 20_000)
    with pytest.raises(DataError, match=r"1 x large.*take more than 20,000 bytes.*--downsample"):
        _prepared(tmp_path)


def test_an_interrupted_command_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise Stop

    for i in range(5):
        write_pyramid(tmp_path / "in" / "ab"[i % 2] / f"{i}.tif", scene(200, 200, SIDE, CELLS[:2], i), 1)
    options = Options(per_shard=1, tiles=Tiling(SIDE))
    prepare(str(tmp_path / "in"), tmp_path / "reference" / "set", options, Columns())
    with pytest.raises(Stop):
        prepare(str(tmp_path / "in"), tmp_path / "set", options, Columns(), progress=stop)
    with pytest.raises(DataError, match="unfinished set with other options"):
        prepare(str(tmp_path / "in"), tmp_path / "set", Options(per_shard=1, tiles=Tiling(32)), Columns())
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob(".set.partial/set/*.tar")}
    assert len(kept) == 2
    prepare(str(tmp_path / "in"), tmp_path / "set", options, Columns())
    assert files_of(tmp_path / "set") == files_of(tmp_path / "reference" / "set")
    assert finished(str(tmp_path / "in"), tmp_path / "set", options, Columns()) is not None
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "set").glob("*.tar"))].count(0) == 0


@pytest.mark.slow
def test_memory_does_not_grow_with_the_image(tmp_path: Path) -> None:
    """The image has 157 MB of pixels. A row of its pieces and one tile are in memory, and the tiles as JPEGs."""
    code = """
import resource, sys
import numpy as np, tifffile
from pathlib import Path
from vimscale.prepare.inputs.rows import Columns
from vimscale.prepare.make import prepare
from vimscale.prepare.shapes import Options
from vimscale.data.images.cutting import Tiling

piece = np.random.default_rng(0).integers(0, 255, (16, 64, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
peaks = []
for height in (512, 5120):
    folder = Path(sys.argv[1]) / str(height)
    (folder / "in/a").mkdir(parents=True)
    pieces = (piece for _ in range(height // 256 * 10))
    about = {"shape": (height, 10240, 3), "dtype": np.uint8, "tile": (256, 1024), "photometric": "rgb"}
    tifffile.imwrite(folder / "in/a/x.tif", pieces, **about)
    prepare(str(folder / "in"), folder / "set", Options(tiles=Tiling(256)), Columns())
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(peaks[1] - peaks[0])
"""
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    jpegs = sum(path.stat().st_size for path in tmp_path.glob("5120/set/*.tar"))
    assert int(run.stdout) * 1024 < 2 * jpegs + 30e6, f"{jpegs / 1e6:.0f} MB of JPEGs"


# ---- the commands


def _command(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["data", *arguments])
    if isinstance(done.exception, DataError):
        return done.exception.exit_code, str(done.exception)
    assert done.exception is None, done.output
    return done.exit_code, done.output


def test_the_command_cuts_and_reports(tmp_path: Path) -> None:
    write_pyramid(tmp_path / "in" / "a" / "x.tif", scene(400, 400, SIDE, CELLS))
    _save(tmp_path / "in" / "b" / "y.png", scene(64, 64, SIDE, [(0, 0)]))
    where = [str(tmp_path / "in"), str(tmp_path / "set")]
    code, said = _command("prepare", *where, "--tiles", "32", "--level", "0", "--background", "5", "--jobs", "1")
    assert code == 0, said
    assert "2 images in 16 tiles, of 2 classes in 1 shards" in said
    code, said = _command("stats", str(tmp_path / "set"), "--sheet", str(tmp_path / "sheet.png"))
    assert "32 x 32 pixels, 4 to 12 per image, 16 in all" in said
    assert (tmp_path / "sheet.png").exists()
    code, said = _command("verify", str(tmp_path / "set"), "--deep", "--jobs", "1")
    assert "2 samples in 1 shards are intact: every image decodes" in said


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--level", "1"], "--level: only tiles have these options; give --tiles SIDE, or leave them out"),
        (["--background", "3", "--tile-format", "png"], "--background, --tile-format: only tiles have these options"),
        (["--tiles", "64", "--level", "1", "--downsample", "2"], "--level 1 and --downsample 2 both choose a level"),
        (["--tiles", "64", "--tile-format", "gif"], "--tile-format 'gif' is not jpg or png"),
        (["--tiles", "64", "--resize", "99", "--no-decode"], "leave out --resize and --no-decode"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(tmp_path: Path, options: list[str], why: str) -> None:
    _save(tmp_path / "in" / "a" / "x.png", scene(64, 64, SIDE, [(0, 0)]))
    code, said = _command("prepare", str(tmp_path / "in"), str(tmp_path / "set"), *options)
    assert code == 2
    assert why in said
    assert not list(tmp_path.glob("*set*"))


# ---- what other commands do with such sets


@pytest.fixture
def made(tmp_path: Path) -> Path:
    for i in range(6):
        _save(tmp_path / "in" / "ab"[i % 2] / f"{i}.png", scene(200, 264, SIDE, CELLS[: 1 + i % 3], i))
    prepare(str(tmp_path / "in"), tmp_path / "set", Options(per_shard=3, tiles=PNG), Columns())
    return tmp_path / "set"


def test_a_deep_check_decodes_every_tile(made: Path) -> None:
    located = inspect.locate(str(made))
    found = inspect.verify(located, deep=True)
    assert not [fault for health in found for fault in health.faults]
    assert not inspect.miscounted(located, found)
    data = (made / "00000.tar").read_bytes()
    at = data.index(b"IDAT") + 8
    (made / "00000.tar").write_bytes(data[:at] + b"\xff" * 40 + data[at + 40 :])
    faults = [fault for health in inspect.verify(located, deep=True) for fault in health.faults]
    assert any("tile r000" in fault and "cannot be decoded" in fault for fault in faults)
    todo = repair.steps(inspect.verify(located, deep=True))
    repair.repair(located, todo)
    repaired = inspect.locate(str(made))
    assert repaired.manifest.samples == 5
    assert repaired.manifest.tiles is not None
    assert repaired.manifest.tiles.total == sum(len(_tiles(sample)) for sample in samples_of(made).values())


def test_tars_of_bags_can_be_indexed_and_merged(made: Path, tmp_path: Path) -> None:
    folder, indexed, unread = adopt.index([str(made)], tmp_path / "indexed", classes=("a", "b"))
    original = inspect.locate(str(made)).manifest
    assert not unread
    assert (indexed.tiles, indexed.labels, indexed.sides) == (original.tiles, original.labels, original.sides)
    assert np.allclose(indexed.mean, original.mean, atol=3e-3), "up to the padding of rims"
    prepare(str(tmp_path / "in"), tmp_path / "other", Options(seed=1, per_shard=2, tiles=PNG), Columns())
    both = [inspect.locate(str(folder)), inspect.locate(str(tmp_path / "other"))]
    merged = merge.merge(both, tmp_path / "merged")
    assert merged.tiles == Bags(SIDE, 1, 3, 2 * 12)
    prepare(str(tmp_path / "in"), tmp_path / "small", Options(tiles=Tiling(32)), Columns())
    with pytest.raises(DataError, match="its samples are bags of 32-pixel tiles, not bags of 64-pixel tiles as in"):
        merge.merge([both[0], inspect.locate(str(tmp_path / "small"))], tmp_path / "mixed")
    with pytest.raises(DataError, match=r"holds bags of tiles of 64 pixels, and .* 32 pixels; make a set of each"):
        adopt.index([str(made), str(tmp_path / "small")], tmp_path / "mixed")


def test_a_contact_sheet_shows_tiles_where_they_were(made: Path) -> None:
    sheet = contact_sheet.draw(inspect.locate(str(made)), None)
    colours = {colour for _, colour in sheet.getcolors(1 << 20)}
    assert (bags._LEFT_OUT,) * 3 in colours
    assert len(colours) > 1000, "the noise of the tiles"
